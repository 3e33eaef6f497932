"""Runs on a Ray cluster of two nodes, and in local jobs of submitit: the same results; what is lost is made again."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
from beaten_runs import PLAN, make, outcomes
from jobs_to_lose import kill_own_process, leave_mark
from killed_study import figures, trials_of
from rich.console import Console

from normlab.errors import InputError
from normlab.study import clusters
from normlab.study.clusters import RayExecutor, SlurmExecutor
from normlab.study.compare import make_job
from normlab.study.executors import HereExecutor, Job, make_executor, run_jobs
from normlab.study.store import RunStore


def console() -> Console:
    return Console(file=StringIO(), width=120)


def shown(out: Console) -> str:
    return out.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture(scope="module")
def ray_cluster():
    """Two nodes of one core each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray asks a node five times whether it lives before it takes it for lost: every second, and not every three.
    quick = {"health_check_period_ms": 1000}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": quick}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[str]:
    """The results of one process."""
    store = RunStore(tmp_path_factory.mktemp("here") / "runs.jsonl")
    run_jobs(jobs(), store, HereExecutor(1), console())
    return results(store)


def jobs() -> list[Job]:
    return [make_job(trial, None) for trial in trials_of(4)]


def results(store: RunStore) -> list[str]:
    return sorted(map(figures, store.read()))


def test_a_ray_cluster_gives_the_results_of_one_process(ray_cluster, undisturbed, tmp_path):
    store = RunStore(tmp_path / "runs.jsonl")
    run_jobs(jobs(), store, RayExecutor(ray_cluster.address), console())
    assert results(store) == undisturbed


def test_runs_of_a_ray_node_that_is_killed_are_made_again_and_none_twice(ray_cluster, tmp_path):
    store, out = RunStore(tmp_path / "runs.jsonl"), console()
    lost = ray_cluster.add_node(num_cpus=1, resources={"lost": 1})
    marks = [Job(str(number), f"mark {number}", 1.0, partial(leave_mark, tmp_path, number), {}) for number in range(9)]
    thread = threading.Thread(target=_kill_when_at_work, args=(ray_cluster, lost, tmp_path))
    thread.start()
    run_jobs(marks, store, RayExecutor(ray_cluster.address), out)
    thread.join()
    assert sorted(record.key for record in store.read()) == [str(number) for number in range(9)]
    assert {record.status for record in store.read()} == {"finished"}
    assert shown(out).count("is made again") == 1
    assert len(list(tmp_path.glob("*.began"))) == 9 + 1


def _kill_when_at_work(cluster, node, folder: Path) -> None:
    """Kill the node as soon as a run is on it."""
    while not any(path.read_text() == node.node_id for path in folder.glob("*.began")):
        time.sleep(0.05)
    cluster.remove_node(node, allow_graceful=False)


def test_a_ray_cluster_stops_the_settings_that_one_process_stops(ray_cluster, tmp_path):
    make(tmp_path / "here", HereExecutor(1))
    make(tmp_path / "ray", RayExecutor(ray_cluster.address))
    assert outcomes(tmp_path / "ray") == outcomes(tmp_path / "here")


def test_local_jobs_of_submitit_stop_the_settings_that_one_process_stops(tmp_path):
    pytest.importorskip("submitit")
    few = replace(PLAN, norms=["batch"], lrs=[0.1, 1.0], seeds=[0, 1, 2, 3])
    make(tmp_path / "here", HereExecutor(1), few)
    make(tmp_path / "slurm", SlurmExecutor(tmp_path / "jobs", workers=2, cluster="local"), few)
    assert [status for status, _ in outcomes(tmp_path / "here").values()].count("stopped") == 1
    assert outcomes(tmp_path / "slurm") == outcomes(tmp_path / "here")


def test_a_cluster_of_this_machine_alone_writes_nothing_into_the_home_folder(tmp_path):
    pytest.importorskip("ray")
    code = """if True:
        import sys
        from functools import partial
        from pathlib import Path
        from rich.console import Console
        from jobs_to_lose import leave_mark
        from normlab.study.clusters import RayExecutor
        from normlab.study.executors import Job, run_jobs
        from normlab.study.store import RunStore

        job = Job("0", "a run", 1.0, partial(leave_mark, Path(sys.argv[1]), 0), {})
        run_jobs([job], RunStore(Path(sys.argv[1], "runs.jsonl")), RayExecutor(workers=1), Console())
    """
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True, timeout=120)
    assert [record.status for record in RunStore(tmp_path / "runs.jsonl").read()] == ["finished"]
    assert list(home.iterdir()) == []


def test_a_ray_cluster_that_does_not_answer_is_named(tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(InputError, match=r"address='127\.0\.0\.1:1': no Ray cluster answers"):
        run_jobs(jobs(), RunStore(tmp_path / "runs.jsonl"), RayExecutor("127.0.0.1:1"), console())


def test_local_jobs_of_submitit_give_the_results_of_one_process(undisturbed, tmp_path):
    pytest.importorskip("submitit")
    store = RunStore(tmp_path / "runs.jsonl")
    run_jobs(jobs(), store, SlurmExecutor(tmp_path / "slurm", workers=2, cluster="local"), console())
    assert results(store) == undisturbed
    assert not list(tmp_path.glob("slurm/*.share"))


def test_a_job_of_submitit_that_is_killed_is_made_again(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setattr(clusters, "LATE_SECONDS", 0.0)
    store, out = RunStore(tmp_path / "runs.jsonl"), console()
    job = Job("killed", "a run that is killed", 1.0, partial(kill_own_process, tmp_path, 1), {})
    run_jobs([job], store, SlurmExecutor(tmp_path / "slurm", cluster="local"), out)
    assert [record.status for record in store.read()] == ["finished"]
    assert shown(out).count("is made again: its job") == 1


@pytest.mark.parametrize(("library", "name"), [("ray", "ray"), ("submitit", "slurm")])
def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch, library, name):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=rf'The library {library} is not installed. .*"normlab\[{name}\]"'):
        make_executor(name)


def test_slurm_that_is_not_there_and_options_that_are_unknown_are_said(tmp_path):
    pytest.importorskip("submitit")
    with pytest.raises(InputError, match="submitit refuses"):
        SlurmExecutor(tmp_path, cluster="slurm")
    with pytest.raises(InputError, match="submitit refuses"):
        SlurmExecutor(tmp_path, cluster="local", memory="4 GB")
