"""The fixture `contest`: pytest-benchmark times dyncore, its rivals run in the same rounds, numbers are checked first.

After the session, benchmarks/results/<op>.json holds the records of each file that ran, in the schema of
dyncore.measure.records, with the command that made them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dyncore.bench.contest import OURS, Point, check, make_record
from dyncore.measure import Timing, new_results, write_results

MIN_ROUNDS, MAX_ROUNDS = 5, 50


_RECORDS = pytest.StashKey[dict[str, list]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, default=Path(__file__).parent / "results", help="folder of the records")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RECORDS] = {}


def _rounds(timer, seconds: float) -> int:
    """As many rounds as fit into `seconds`, by the first one (whose samples are dropped)."""
    timer.round()
    spent = sum(samples.pop() for samples in timer.samples.values()) / 1e9
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / spent)))


@pytest.fixture
def contest(benchmark, request: pytest.FixtureRequest) -> Callable[[Point], None]:
    """contest(point): check every variant, then time dyncore by pytest-benchmark, each rival once before each round."""

    def run(point: Point) -> None:
        competing, wrong, unavailable = check(point.build())
        assert not wrong, wrong
        rivals = competing.timer([name for name in competing.variants if name != OURS])
        ours, arguments = competing.callables()[OURS], competing.arguments()
        competing.timer(list(competing.variants)).warm_up()
        rounds = _rounds(rivals, float(benchmark._max_time))

        def next_round() -> tuple[tuple, dict]:
            rivals.round()
            return arguments(OURS, rivals.rounds), {}

        benchmark.pedantic(ours, setup=next_round, rounds=rounds)
        samples = {OURS: Timing(tuple(round(s * 1e9) for s in benchmark.stats.stats.data)), **rivals.timings()}
        record = make_record(point, competing, {name: timing.record() for name, timing in samples.items()}, unavailable)
        benchmark.extra_info.update({f"over {name}": round(x, 3) for name, x in record["against"].items()})
        name = Path(request.node.path).stem.removeprefix("bench_")
        request.config.stash[_RECORDS].setdefault(name, []).append(record)

    return run


def pytest_sessionfinish(session: pytest.Session) -> None:
    folder: Path = session.config.getoption("results")
    records = session.config.stash[_RECORDS]
    # all before the first is written, which would modify the commit's files
    results = {name: new_results(f"pytest benchmarks/bench_{name}.py --benchmark-only") for name in records}
    for name in records:
        folder.mkdir(parents=True, exist_ok=True)
        write_results(folder / f"{name}.json", results[name] | {"records": records[name]})
