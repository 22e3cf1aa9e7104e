"""Examples are found in files, globs, folders, saved data sets, and the hub's cache."""

from __future__ import annotations

import pytest

A, B = {"text": "a"}, {"text": "b"}


def test_a_glob_reads_all_its_files(jsonl, load, refused, tmp_path):
    jsonl("part-1.jsonl", A)
    jsonl("part-2.jsonl", B)
    assert load(tmp_path / "part-*.jsonl").train["text"] == ["a", "b"]
    assert "no file is named so" in refused(tmp_path / "none-*.jsonl")


def test_files_of_a_source_are_alike(jsonl, tmp_path, refused):
    jsonl("1.jsonl", A)
    jsonl("2.jsonl", {"prompt": "a", "completion": "b"})
    assert "files of prompt_completion and text" in refused(tmp_path / "*.jsonl")


def test_a_folder_has_splits(jsonl, load, refused, tmp_path):
    jsonl("folder/train.jsonl", A)
    bad = jsonl("folder/test.jsonl", B, {"text": 3})
    folder = tmp_path / "folder"
    assert load(folder).train["text"] == ["a"]  # and not what is held out
    assert f"{bad}:2" in refused([{"path": str(folder), "split": "test"}])
    message = refused([{"path": str(folder), "split": "dev"}])
    assert "got the split 'dev', allowed is train, test" in message


def test_saved_data_sets_are_read(tmp_path, load, refused, capfd):
    from datasets import Dataset, DatasetDict

    rows = {name: Dataset.from_list([row]) for name, row in (("train", A), ("validation", B))}
    DatasetDict(rows).save_to_disk(tmp_path / "saved")
    held_out = [{"path": str(tmp_path / "saved"), "split": "validation"}]
    found = load(tmp_path / "saved", eval=held_out)
    assert (found.train["text"], found.held_out["text"]) == (["a"], ["b"])
    missing = [{"path": str(tmp_path / "saved"), "split": "test"}]
    assert "got the split 'test', allowed is train, validation" in refused(missing)
    assert "set it to false" in refused(tmp_path / "saved", streaming=True)


@pytest.fixture
def hub(monkeypatch, tmp_path, jsonl):
    """Put a data set into the cache that downloads of the hub leave."""
    import datasets

    jsonl("org_name/train.jsonl", A, A)
    jsonl("org_name/validation.jsonl", B)
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    built = datasets.load_dataset_builder(str(tmp_path / "org_name"), cache_dir=str(cache))
    built.download_and_prepare()
    (cache / "org_name").rename(cache / "org___name")
    for file in (cache / "org___name").rglob("org_name-*.arrow"):
        file.rename(file.with_name(file.name.removeprefix("org_")))


@pytest.mark.filterwarnings("ignore:Using the latest cached version")
def test_the_hub_is_asked_by_name_and_split(hub, load, refused):
    found = load("org/name", eval="org/name:validation")
    assert (found.train["text"], found.held_out["text"]) == (["a", "a"], ["b"])
    assert len(load([{"path": "org/name:train[:1]"}]).train) == 1
    assert "cannot be loaded" in refused("org/name:dev")
    assert "cannot be loaded" in refused("org/other")


def test_parts_of_a_hub_id():
    from sft.data.source import locate
    from sft.data.spec import SourceSpec

    assert locate(SourceSpec(path="org/name")) == ("org/name", None, "train")
    assert locate(SourceSpec(path="glue:dev")) == ("glue", None, "dev")
    found = locate(SourceSpec(path="nyu-mll/glue:stsb/validation"))
    assert found == ("nyu-mll/glue", "stsb", "validation")
    given = SourceSpec(path="org/name", config="en", split="test")
    assert locate(given) == ("org/name", "en", "test")


def test_near_names_are_told(refused):
    assert "did you mean 'cmudict'" in refused("cmudct")
    assert refused("./cmudict").startswith("data.train: ./cmudict: no such file")


def test_cells_are_text_except_labels(tmp_path, load):
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\n007\t1\nnull\t0\nNA\t1\n")
    found = load(path)
    assert found.train["text"] == ["007", "null", "NA"]
    assert found.train["label"] == [1, 0, 1]
    path.write_text("text\tlabel\na\t0.5\nb\t1\n")
    assert load(path).train["label"] == [0.5, 1.0]
    path.write_text("text\tlabel\na\t1\nb\tx\n")
    assert load(path).train["label"] == ["1", "x"]


def test_folders_of_images_are_classes(tmp_path, load):
    from PIL import Image

    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (4, 3), colour).save(tmp_path / "images" / name / "1.png")
    found = load(tmp_path / "images")
    assert found.format == "image_classification"
    assert found.train.features["label"].names == ["blue", "red"]
    assert found.train[0]["image"].size == (4, 3)


def test_images_are_named_beside_their_file(tmp_path, jsonl, load, refused):
    from PIL import Image

    Image.new("RGB", (4, 3)).save(tmp_path / "1.png")
    path = jsonl("a.jsonl", {"image": "1.png", "label": "black"})
    assert load(path).train[0]["image"].size == (4, 3)
    path = jsonl("b.jsonl", {"image": "1.png", "label": "black"}, {"image": None, "label": "red"})
    assert "b.jsonl:2: 'image' is missing" in refused(path)
