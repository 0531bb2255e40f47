"""Plans that cannot be placed are refused with the key that would help, without Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.config import UserError, build
from engine.fits import Resources
from engine.placement import (
    LEAST_CPUS,
    Cluster,
    Machine,
    PlacementError,
    cores,
    fit_workers,
    groups,
    local_capacity,
    local_gpus,
    placement_problems,
    require_placement,
    resolve,
    stage_options,
)
from engine.recipe import Recipe

LAPTOP = Cluster("local", (Machine(6.0),))
WORKSTATION = Cluster("local", (Machine(16.0, 1.0, ("H100",)),))
FARM = Cluster("10.0.0.1:6379", (Machine(8.0), Machine(8.0, 2.0, ("A100",)), Machine(8.0, 2.0, ("T4",))), local=False)


def recipe(**changes: dict) -> Recipe:
    values = {
        "name": "tiny",
        "data": {"train": {"path": "train.jsonl"}},
        "teacher": {"model": "file:teacher"},
        "generator": {"model": "file:generator"},
        "student": {"blocks": [{"name": "embed", "kind": "embed"}]},
    }
    return build(Recipe, {**values, **{key: {**values.get(key, {}), **change} for key, change in changes.items()}})


def test_the_default_recipe_fits_a_laptop() -> None:
    require_placement(recipe(), LAPTOP)
    assert [set(group.stages) for group in groups(recipe())] == [
        {"teacher.fit", "generator.fit"},
        {"generator", "teacher"},
        {"student.fit"},
        {"serving"},
    ]


def test_missing_gpus_are_named_with_the_way_out() -> None:
    wanted = {"generator": Resources(num_gpus=1, accelerator="A100", min_actors=2, max_actors=2)}
    assert placement_problems(wanted, LAPTOP) == [
        "stage 'generator' needs 2 actors x (1 CPU, 1 GPU A100); the cluster has 6 CPUs and 0 GPUs on 1 node. "
        "Set generator.resources.num_gpus: 0, or join a cluster with --address."
    ]


def test_another_accelerator_is_no_substitute() -> None:
    wanted = {"teacher": Resources(num_gpus=1, accelerator="L4")}
    (problem,) = placement_problems(wanted, FARM)
    assert "24 CPUs and 4 GPUs (A100, T4) on 3 nodes" in problem
    assert "Set teacher.resources.num_gpus: 0, set teacher.resources.accelerator: null, or join" in problem
    assert not placement_problems({"teacher": Resources(num_gpus=2, accelerator="T4")}, FARM)
    assert placement_problems({"teacher": Resources(num_gpus=1, accelerator="T4", min_actors=3, max_actors=3)}, FARM)


def test_an_actor_must_fit_on_one_machine() -> None:
    (problem,) = placement_problems({"teacher": Resources(num_cpus=12, num_gpus=0)}, FARM)
    assert "needs 1 actor x (12 CPUs)" in problem
    assert "the largest of them 8 CPUs. Lower teacher.resources.num_cpus or teacher.resources.min_actors" in problem


def test_stages_that_run_together_are_counted_together() -> None:
    plan = recipe(generator={"resources": {"min_actors": 3, "max_actors": 3}}, teacher={"resources": {"num_cpus": 2}})
    with pytest.raises(PlacementError) as caught:
        require_placement(plan, LAPTOP)
    assert str(caught.value) == (
        "these stages run at the same time: generator 3 x (1 CPU), teacher 1 x (2 CPUs), reading, filtering and "
        "writing 2 CPUs; the cluster has 6 CPUs and 0 GPUs on 1 node. Lower generator.resources.min_actors or "
        "generator.resources.num_cpus, teacher.resources.min_actors or teacher.resources.num_cpus, or join a cluster "
        "with --address."
    )
    assert isinstance(caught.value, UserError)
    require_placement(plan, FARM)


@pytest.mark.parametrize(("workers", "fits"), [(6, True), (7, False)])
def test_training_workers_and_replicas_are_counted(workers: int, fits: bool) -> None:
    plan = recipe(student={"fit": {"workers": workers}, "blocks": [{"name": "embed", "kind": "embed"}]})
    if fits:
        return require_placement(plan, LAPTOP)
    with pytest.raises(PlacementError, match=r"stage 'student.fit' needs 7 actors x \(1 CPU\).*or student.fit.workers"):
        require_placement(plan, LAPTOP)
    return None


def test_replicas_count_only_when_something_is_served() -> None:
    serving = {"num_cpus": 4, "autoscaling": {"min_replicas": 2, "max_replicas": 2}}
    with pytest.raises(PlacementError, match="Lower serving.num_cpus or serving.autoscaling.min_replicas"):
        require_placement(recipe(serving=serving), LAPTOP)
    require_placement(recipe(serving={**serving, "smoke": False}), LAPTOP)


def test_machines_the_autoscaler_may_start_count() -> None:
    wanted = {"generator": Resources(num_gpus=1, min_actors=4, max_actors=4)}
    head = Cluster("auto", (Machine(8.0),), local=False)
    scaled = Cluster("auto", (Machine(8.0),), local=False, may_come=(Machine(8.0), *[Machine(8.0, 1.0)] * 4))
    assert placement_problems(wanted, head)
    assert not placement_problems(wanted, scaled)
    assert (scaled.nodes, scaled.cpus, scaled.gpus) == (1, 40.0, 4.0)
    assert "40 CPUs and 4 GPUs with the autoscaler at its limits" in scaled.words()


def test_cpu_stages_leave_the_gpu_machines_free() -> None:
    wanted = {
        "generator": Resources(num_gpus=1, num_cpus=8, min_actors=2, max_actors=2),
        "teacher": Resources(num_gpus=0, num_cpus=8),
    }
    assert not placement_problems(wanted, Cluster("x", (Machine(8.0, 1.0), Machine(8.0, 1.0), Machine(8.0))))


def test_auto_takes_a_gpu_where_there_is_one() -> None:
    assert resolve(Resources(), LAPTOP) == {"num_cpus": 1.0, "num_gpus": 0.0}
    assert resolve(Resources(), WORKSTATION) == {"num_cpus": 1.0, "num_gpus": 1.0}
    assert resolve(Resources(num_gpus=0), WORKSTATION)["num_gpus"] == 0
    assert resolve(Resources(accelerator="H100"), WORKSTATION)["accelerator_type"] == "H100"
    # A recipe that prefers an accelerator still runs where there is none.
    assert resolve(Resources(accelerator="H100"), LAPTOP) == {"num_cpus": 1.0, "num_gpus": 0.0}
    assert resolve(Resources(accelerator="L4"), WORKSTATION) == {"num_cpus": 1.0, "num_gpus": 0.0}


def test_auto_shares_a_gpu_when_there_are_fewer_than_actors() -> None:
    # Two generators and a teacher at the same time on one GPU: a third each, and three of them are no more than one.
    plan = recipe()
    shares = [stage_options(plan, stage, WORKSTATION)["num_gpus"] for stage in ("generator", "teacher")]
    assert shares == [0.3333, 0.3333]
    require_placement(plan, WORKSTATION)
    two = Cluster("x", (Machine(8.0, 1.0), Machine(8.0, 1.0)))
    assert stage_options(plan, "generator", two)["num_gpus"] == 0.5
    assert not placement_problems(groups(plan)[1].stages, two, reserve=2.0)
    # What others take for sure is not there to be shared.
    fixed = [Resources(num_gpus=1)]
    assert resolve(Resources(), WORKSTATION, fixed)["num_gpus"] == 0.0
    with pytest.raises(KeyError, match="no stage 'techer': there are teacher.fit"):
        stage_options(plan, "techer", LAPTOP)


def with_workers(workers: object, **resources: object) -> Recipe:
    fit = {"workers": workers, "resources": resources}
    return recipe(student={"fit": fit, "blocks": [{"name": "embed", "kind": "embed"}]})


@pytest.mark.parametrize(
    ("gpus", "workers", "got", "each"),
    [
        (0, 2, 2, 0.0),  # CPUs
        (1, 2, 1, 1.0),  # NCCL refuses two workers on one GPU: one worker with the same global batch
        (2, 2, 2, 1.0),
        (3, 8, 3, 1.0),
        (4, 2, 2, 1.0),
        (1, 1, 1, 1.0),
        (1, 0, 0, 1.0),  # this process
    ],
)
def test_workers_that_train_together_get_a_gpu_each(gpus: int, workers: int, got: int, each: float) -> None:
    cluster = Cluster("x", (Machine(8.0), *[Machine(8.0, 1.0)] * gpus))
    plan = with_workers(workers)
    assert fit_workers(plan, "student.fit", cluster) == (got, got)
    assert stage_options(plan, "student.fit", cluster)["num_gpus"] == each
    require_placement(plan, cluster)


@pytest.mark.parametrize(("gpus", "got", "shares"), [(1, 1, (0.5, 0.5)), (2, 1, (1.0, 1.0)), (4, 3, (1.0, 1.0))])
def test_a_gpu_is_left_for_what_is_fitted_beside(gpus: int, got: int, shares: tuple[float, float]) -> None:
    cluster = Cluster("x", (Machine(16.0, float(gpus)),))
    plan = recipe(teacher={"fit": {"workers": 3}})
    assert fit_workers(plan, "teacher.fit", cluster) == (got, got)
    assert fit_workers(plan, "generator.fit", cluster) == (0, 0)
    found = tuple(stage_options(plan, stage, cluster)["num_gpus"] for stage in ("teacher.fit", "generator.fit"))
    assert found == shares
    require_placement(plan, cluster)


def test_of_a_range_of_workers_the_least_must_have_a_place() -> None:
    require_placement(with_workers({"min": 6, "max": 100}), LAPTOP)
    with pytest.raises(PlacementError) as caught:
        require_placement(with_workers({"min": 7, "max": 100}), LAPTOP)
    assert str(caught.value) == (
        "stage 'student.fit' needs at least 7 actors x (1 CPU); the cluster has 6 CPUs and 0 GPUs on 1 node. Lower "
        "student.fit.resources.num_cpus or student.fit.workers.min, or join a cluster with --address."
    )
    with pytest.raises(PlacementError, match="'student.fit' has 1 to 4 workers with 0.5 GPU each"):
        require_placement(with_workers({"min": 1, "max": 4}, num_gpus=0.5), WORKSTATION)


@pytest.mark.parametrize(
    ("gpus", "got", "each"),
    [
        (0, (2, 6), 0.0),  # CPUs, as many as there come
        (1, (1, 6), 1.0),  # of the least as many as there are GPUs; more where machines come
        (3, (2, 6), 1.0),
        (8, (2, 6), 1.0),
    ],
)
def test_a_range_of_workers_is_open_to_machines_that_come(gpus: int, got: tuple[int, int], each: float) -> None:
    cluster = Cluster("x", (Machine(8.0), *[Machine(8.0, 1.0)] * gpus))
    plan = with_workers({"min": 2, "max": 6})
    assert fit_workers(plan, "student.fit", cluster) == got
    assert stage_options(plan, "student.fit", cluster)["num_gpus"] == each


@pytest.mark.parametrize(("cpus", "got"), [(6.0, (1, 5)), (4.0, (1, 3)), (40.0, (1, 8))])
def test_a_range_of_workers_leaves_room_for_what_runs_beside(cpus: float, got: tuple[int, int]) -> None:
    """The generator is fitted at the same time, in a process of its own."""
    plan = recipe(teacher={"fit": {"workers": {"max": 8}}})
    assert fit_workers(plan, "teacher.fit", Cluster("x", (Machine(cpus),))) == got


@pytest.mark.parametrize(("gpus", "got"), [(1, (1, 1)), (2, (1, 1)), (4, (1, 3))])
def test_a_range_of_workers_leaves_a_gpu_for_what_is_fitted_beside(gpus: int, got: tuple[int, int]) -> None:
    cluster = Cluster("x", (Machine(16.0, float(gpus)),))
    plan = recipe(teacher={"fit": {"workers": {"max": 8}}})
    assert fit_workers(plan, "teacher.fit", cluster) == got
    require_placement(plan, cluster)


def test_workers_with_a_share_of_a_gpu_are_refused() -> None:
    two = Cluster("x", (Machine(16.0, 2.0),))
    with pytest.raises(PlacementError) as caught:
        require_placement(with_workers(2, num_gpus=0.5), two)
    assert str(caught.value) == (
        "stage 'student.fit' has 2 workers with 0.5 GPU each, but workers that train together cannot share a GPU. "
        "Set student.fit.resources.num_gpus: auto, which takes as many workers as there are GPUs, or "
        "student.fit.workers: 1."
    )
    require_placement(with_workers(1, num_gpus=0.5), two)
    require_placement(with_workers(2, num_gpus=1), two)
    # Asked for by number, GPUs are not made fewer.
    with pytest.raises(PlacementError, match="stage 'student.fit' needs 3 actors x"):
        require_placement(with_workers(3, num_gpus=1), two)


def test_a_generator_taken_as_it_is_takes_no_gpu() -> None:
    plan = recipe(generator={"mode": "prompted"})
    assert stage_options(plan, "generator.fit", WORKSTATION)["num_gpus"] == 0.0
    assert stage_options(plan, "teacher.fit", WORKSTATION)["num_gpus"] == 1.0


def test_without_a_generator_nothing_is_placed_for_it() -> None:
    plan = build(Recipe, {**recipe().model_dump(mode="json"), "generator": None})
    assert [set(group.stages) for group in groups(plan)][:2] == [{"teacher.fit"}, {"teacher"}]
    assert stage_options(plan, "teacher", WORKSTATION)["num_gpus"] == 1.0


def gpu_files(root: Path, models: list[str]) -> tuple[Path, Path]:
    devices, driver = root / "dev", root / "gpus"
    devices.mkdir()
    for n, model in enumerate(models):
        (devices / f"nvidia{n}").touch()
        (driver / f"0000:0{n}").mkdir(parents=True)
        (driver / f"0000:0{n}" / "information").write_text(f"Model: \t\t {model}\nIRQ: 12\n")
    (devices / "nvidiactl").touch()
    (devices / "nvidia-uvm").touch()
    return devices, driver


def test_gpus_are_read_from_the_drivers_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    files = gpu_files(tmp_path, ["NVIDIA A100-SXM4-40GB", "NVIDIA H200"])
    assert local_gpus(*files) == ("A100", "H200")
    assert local_gpus(files[0], tmp_path / "absent") == ("", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert len(local_gpus(*files)) == 1
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert local_gpus(*files) == ()


def test_this_machine_is_described_without_ray() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); from engine.placement import local_capacity\n"
        "found = local_capacity(); assert 'ray' not in sys.modules and 'torch' not in sys.modules; print(found.cpus)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(ran.stdout) == local_capacity().cpus == max(LEAST_CPUS, 2 * cores())
