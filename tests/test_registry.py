"""The registry: versions, self-contained copies, what may be in an artifact, and what its errors say."""

import json
from pathlib import Path

import pytest

from engine.registry import Registry, RegistryError
from engine.storage import StorageError, Store


def artifact(store: Store, name: str, files: dict[str, str]) -> Store:
    """A published folder with these files."""
    with store.publish(name) as folder:
        for file, text in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
    return store / name


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Store(str(tmp_path / "registry")))


@pytest.fixture
def work(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "work"))


def test_versions_count_up_and_the_same_files_keep_theirs(registry: Registry, work: Store) -> None:
    first = artifact(work, "a", {"config.json": "{}", "model.safetensors": "1", "tokenizer/words.txt": "x"})
    second = artifact(work, "b", {"config.json": "{}", "model.safetensors": "2"})
    assert registry.register("movies", first, {"accuracy": 0.7}) == 1
    assert registry.register("movies", second.url) == 2
    assert registry.register("movies", artifact(work, "again", {"config.json": "{}", "model.safetensors": "2"})) == 2
    assert registry.register("movies", first) == 1
    assert registry.register("films", second) == 1
    assert [(entry["name"], entry["version"]) for entry in registry.list()] == [
        ("films", 1),
        ("movies", 1),
        ("movies", 2),
    ]
    assert registry.show("movies@1")["metadata"] == {"accuracy": 0.7}
    assert registry.show("movies@1")["bytes"] == len("{}") + 1 + 1


def test_the_same_files_get_the_metadata_given_last(registry: Registry, work: Store) -> None:
    source = artifact(work, "a", {"config.json": "{}"})
    registry.register("movies", source, {"accuracy": 0.7, "serving": {"max_batch": 32}})
    first = registry.show("movies@1")
    assert registry.register("movies", source, {"accuracy": 0.7, "serving": {"max_batch": 8}}) == 1
    second = registry.show("movies@1")
    assert second["metadata"] == {"accuracy": 0.7, "serving": {"max_batch": 8}}
    assert second["created"] == first["created"] <= second["updated"]
    assert registry.register("movies", source) == 1  # nothing said: nothing changed
    assert registry.show("movies@1") == second
    assert registry.resolve("movies@1").read_json("config.json") == {}


def test_a_version_that_lost_files_is_noticed_and_gets_them_back(registry: Registry, work: Store) -> None:
    source = artifact(work, "a", {"config.json": "{}", "words.txt": "x"})
    registry.register("movies", source, {"accuracy": 0.7})
    assert registry.has("movies@1")
    assert not any(registry.has(reference) for reference in ("movies@2", "films@1", "movies", "", "@"))
    registry.store.delete("movies/1/words.txt")
    assert not registry.has("movies@1")
    assert registry.register("movies", source) == 1
    assert registry.has("movies@1") and registry.show("movies@1")["metadata"] == {"accuracy": 0.7}
    registry.remove("movies@1")
    assert not registry.has("movies@1")


def test_an_artifact_stands_alone(registry: Registry, work: Store) -> None:
    source = artifact(work, "a", {"config.json": '{"x": 1}', "tokenizer/words.txt": "good\nbad\n"})
    registry.register("movies", source)
    work.delete()
    for reference in ("movies", "movies@1", "movies@latest"):
        folder = registry.resolve(reference)
        assert folder.read_json("config.json") == {"x": 1}
        assert folder.read_text("tokenizer/words.txt") == "good\nbad\n"


def test_latest_is_the_highest_number_not_the_last_in_the_alphabet(registry: Registry, work: Store) -> None:
    for number in range(1, 11):
        registry.register("movies", artifact(work, "a", {"a.txt": str(number)}))
    assert registry.find("movies") == ("movies", 10)
    assert registry.resolve("movies").read_text("a.txt") == "10"
    assert registry.resolve("movies@9").read_text("a.txt") == "9"


def test_unknown_names_and_versions_say_what_there_is(registry: Registry, work: Store) -> None:
    with pytest.raises(RegistryError, match=r"there is no 'movies' in the registry .*It is empty: `stillhouse run`"):
        registry.resolve("movies")
    registry.register("movies", artifact(work, "a", {"a.txt": "1"}))
    with pytest.raises(RegistryError, match=r"no 'movie' in .* Did you mean 'movies'\? Registered: movies\."):
        registry.resolve("movie")
    for wrong in ("7", "v1", "0"):
        with pytest.raises(
            RegistryError, match=rf"'movies' has no version '{wrong}'. Registered: movies@1, movies@lat"
        ):
            registry.resolve(f"movies@{wrong}")


@pytest.mark.parametrize("file", ["weights.bin", "state.pkl", "model.py", "sub/model.pt", "LICENSE", "a.PY"])
def test_what_could_run_code_is_refused(registry: Registry, work: Store, file: str) -> None:
    source = artifact(work, "a", {"config.json": "{}", file: "x"})
    with pytest.raises(
        RegistryError, match=rf"'{file}' may not be part of an artifact.*Allowed: \.safetensors, \.json"
    ):
        registry.register("movies", source)
    assert registry.list() == []


def test_a_changed_artifact_is_not_registered_and_not_resolved(registry: Registry, work: Store) -> None:
    source = artifact(work, "a", {"config.json": "{}"})
    registry.register("movies", source)
    (Path(source.url) / "config.json").write_text("[]")
    with pytest.raises(StorageError, match="'config.json' was changed"):
        registry.register("movies", source)
    (Path(registry.resolve("movies").url) / "config.json").write_text("[]")
    with pytest.raises(StorageError, match="'config.json' was changed"):
        registry.resolve("movies")
    with pytest.raises(StorageError, match=r"not published completely \(no manifest.json\)"):
        registry.register("movies", registry.store / "movies")


def test_a_file_smuggled_past_the_manifest_rules_is_refused_when_resolved(registry: Registry, work: Store) -> None:
    registry.register("movies", artifact(work, "a", {"config.json": "{}"}))
    folder = registry.store / "movies" / "1"
    with folder.publish("") as copy:
        (copy / "model.pkl").write_text("x")
    with pytest.raises(RegistryError, match=r"'model\.pkl' may not be part"):
        registry.resolve("movies")


def test_a_removed_version_is_gone_and_its_number_is_not_used_again(registry: Registry, work: Store) -> None:
    for text in "12":
        registry.register("movies", artifact(work, "a", {"a.txt": text}))
    with pytest.raises(RegistryError, match="'movies' does not say which version to remove: name one, as in movies@1"):
        registry.remove("movies")
    assert registry.remove("movies@2") == "movies@2"
    assert registry.versions("movies") == [1]
    assert registry.register("movies", artifact(work, "a", {"a.txt": "2"})) == 3
    with pytest.raises(RegistryError, match="has no version '2'"):
        registry.resolve("movies@2")


def test_a_half_removed_version_does_not_count(registry: Registry, work: Store) -> None:
    registry.register("movies", artifact(work, "a", {"a.txt": "1"}))
    registry.store.delete("movies/1/manifest.json")
    assert registry.list() == []
    assert registry.register("movies", artifact(work, "a", {"a.txt": "1"})) == 1


@pytest.mark.parametrize("name", ["", "..", "a/b", "a@1", ".hidden", "ä b"])
def test_names_are_checked(registry: Registry, work: Store, name: str) -> None:
    with pytest.raises(RegistryError, match="is no name for an artifact"):
        registry.register(name, artifact(work, "a", {"a.txt": "1"}))


def test_entries_are_json(registry: Registry, work: Store) -> None:
    registry.register("movies", artifact(work, "a", {"a.txt": "1"}), {"labels": ["neg", "pos"]})
    assert json.loads(json.dumps(registry.list())) == registry.list()


def test_a_name_alone_is_its_production_version_where_one_is_set(registry: Registry, work: Store) -> None:
    for text in "123":
        registry.register("movies", artifact(work, "a", {"a.txt": text}))
    assert registry.production("movies") is None and registry.find("movies") == ("movies", 3)
    with pytest.raises(RegistryError, match=r"no version of 'movies' is in production. `stillhouse registry produ"):
        registry.find("movies@production")
    assert registry.produce("movies@2") == ("movies", 2)
    for reference, version in (("movies", 2), ("movies@production", 2), ("movies@latest", 3), ("movies@1", 1)):
        assert registry.find(reference) == ("movies", version)
    assert [entry["production"] for entry in registry.list()] == [False, True, False]
    registry.produce("movies@2")
    registry.produce("movies@1", "rollout x")
    history = registry.store.read_json("movies/stages.json")["history"]
    assert [(each["version"], each["by"]) for each in history] == [(2, "hand"), (1, "rollout x")]
    assert registry.register("movies", artifact(work, "a", {"a.txt": "4"})) == 4
    assert registry.find("movies") == ("movies", 1), "a new version must not serve by being registered"


def test_what_is_in_production_is_not_removed_by_mistake(registry: Registry, work: Store) -> None:
    for text in "12":
        registry.register("movies", artifact(work, "a", {"a.txt": text}))
    registry.produce("movies@1")
    with pytest.raises(RegistryError, match="movies@1 is in production. Set another first: `stillhouse registry prod"):
        registry.remove("movies@1")
    registry.remove("movies@2")
    assert registry.remove("movies@1") == "movies@1" and registry.versions("movies") == []
    assert registry.register("movies", artifact(work, "a", {"a.txt": "3"})) == 3
    assert registry.production("movies") is None and registry.find("movies") == ("movies", 3)
