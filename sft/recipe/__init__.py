"""Recipes: one strict YAML file a job."""
