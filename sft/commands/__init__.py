"""The commands of `sft`, a file each; heavy modules load inside the functions."""
