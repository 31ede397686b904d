"""Threads and processes: the same bits on any number of threads, from two threads at once, and in forked children."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import dyncore as dc
from dyncore.backends import cpu

pytestmark = pytest.mark.skipif(not cpu.available, reason=cpu.reason)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CORES = os.cpu_count() or 1
COUNTS = [1, 2, 2 * CORES, 3, 1]
T, G, H, I = 300, 5, 130, 140  # noqa: E741


@pytest.fixture
def threads():
    """Whatever a test sets is undone."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def leaf(*shape, dtype, size=1.0):
    return (torch.randn(*shape) * size).to(dtype).requires_grad_()


def plan(rows=T, groups=G, per_row=2):
    """Uneven groups, the last empty, a row in one group twice here and there; every scale a leaf."""
    expert = torch.randint(0, groups - 1, (rows, per_row)) ** 2 // (groups - 1)
    made = dc.route(expert, num_groups=groups)
    scale = torch.randn(made.num_slots, requires_grad=True)
    return dc.Plan(made.rows, made.offsets, scale, rows, made.row_offsets, made.row_slots, made.exact)


def linear(gather, scatter, activation):
    def problem(dtype):
        p = plan()
        x = leaf(T if gather else p.num_slots, H, dtype=dtype)
        weight, bias = leaf(G, I, H, dtype=dtype, size=H**-0.5), leaf(G, I, dtype=dtype)
        leaves = [x, weight, bias, *[p.scale] * scatter]
        return leaves, lambda: dc.grouped_linear(
            x, weight, bias, plan=p, activation=activation, gather=gather, scatter=scatter
        )

    return problem


def mlp(activation, per_row=2, groups=G):
    def problem(dtype):
        p = plan(groups=groups, per_row=per_row)
        width = I * (2 if activation == "swiglu" else 1)
        x, residual = leaf(T, H, dtype=dtype), leaf(T, H, dtype=dtype)
        w_in, w_out = leaf(groups, width, H, dtype=dtype, size=H**-0.5), leaf(groups, H, I, dtype=dtype, size=I**-0.5)
        b_in, b_out = leaf(groups, width, dtype=dtype), leaf(groups, H, dtype=dtype)
        leaves = [x, w_in, w_out, b_in, b_out, residual, p.scale]
        return leaves, lambda: dc.grouped_mlp(
            x, w_in, w_out, b_in, b_out, plan=p, activation=activation, residual=residual
        )

    return problem


def one_panel(dtype):
    """So few columns that threads share out the rows: of the small group, one or two each, of its seven."""
    group = torch.tensor([0] * 200 + [1] * 7)[:, None]
    p = dc.route(group, num_groups=2)
    x, weight = leaf(207, 1024, dtype=dtype), leaf(2, 32, 1024, dtype=dtype, size=1 / 32)
    return [x, weight], lambda: dc.grouped_linear(x, weight, plan=p)


def moving(dtype):
    """Wide enough for both ops to be shared out."""
    p = plan()
    x, base = leaf(T, 1031, dtype=dtype), leaf(T, 1031, dtype=dtype)
    return [x, base, p.scale], lambda: dc.scatter_rows(dc.gather_rows(x, p), p, base)


OPERATIONS = {
    "gather-scatter-rows": moving,
    "linear": linear(True, True, None),
    "linear-gelu": linear(True, True, "gelu"),
    "linear-to-slots": linear(True, False, None),
    "linear-of-slots": linear(False, True, "silu"),
    "linear-slots-slots": linear(False, False, None),
    "linear-one-panel": one_panel,
    "mlp": mlp("swiglu"),
    "mlp-one-slot-a-row": mlp("relu2", per_row=1),
    "mlp-many-groups": mlp("gelu", groups=80),
}


def results(leaves, run):
    """The value and every gradient."""
    with dc.execution("sparse"):
        out = run()
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_do_not_depend_on_the_thread_count(isa, threads, dtype, operation):
    leaves, run = OPERATIONS[operation](dtype)
    torch.set_num_threads(COUNTS[0])
    first = results(leaves, run)
    assert all(torch.isfinite(t).all() for t in first)
    for count in COUNTS[1:]:
        torch.set_num_threads(count)
        assert same(results(leaves, run), first), f"{count} threads"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_threads_of_the_caller_at_once(threads, dtype):
    """Each with kernels on two threads of its own, on the same tensors."""
    torch.set_num_threads(2)
    problems = [OPERATIONS[name](dtype) for name in ("mlp", "linear-gelu", "gather-scatter-rows")]
    alone = [results(*problem) for problem in problems]
    start = threading.Barrier(2)
    wrong = []

    def work():
        start.wait()
        for _ in range(5):
            for problem, want in zip(problems, alone, strict=True):
                if not same(results(*problem), want):
                    wrong.append(problem)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# What the scripts below share: a problem of about a millisecond, the same in every process.
PROBLEM = """
import os, sys, time, torch
import dyncore as dc

torch.set_num_threads(2)
torch.manual_seed(0)
plan = dc.route(torch.randint(0, 4, (256, 2)), num_groups=4)
x, w_in, w_out = torch.randn(256, 128), torch.randn(4, 512, 128), torch.randn(4, 128, 256)


def op():
    with dc.execution("sparse"):
        return dc.grouped_mlp(x, w_in, w_out, plan=plan, activation="swiglu").numpy().tobytes()
"""


def python(tmp_path, code, seconds=120):
    """Runs a file of its own, which children can import; a hang is a failure."""
    script = tmp_path / "script.py"
    script.write_text(PROBLEM + code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=seconds,
        start_new_session=True,
        check=False,
    )


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

FORKED = """
want = op()
child = os.fork()
if child == 0:
    os._exit(0 if op() == want else 3)
deadline = time.monotonic() + 30
while time.monotonic() < deadline:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        assert op() == want
        sys.exit(os.waitstatus_to_exitcode(status))
    time.sleep(0.02)
os.kill(child, 9)
sys.exit("the child hangs")
"""


@needs_fork
def test_a_child_forked_after_threaded_kernels_computes_the_same(tmp_path):
    """GNU's OpenMP runtime would wait for threads that the child does not have."""
    done = python(tmp_path, FORKED)
    assert done.returncode == 0, done.stderr


LOADED = """
class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        torch.set_num_threads(2)  # a worker starts with one
        return op()


if __name__ == "__main__":
    want = op()
    loader = torch.utils.data.DataLoader(
        Items(), batch_size=1, num_workers=2, collate_fn=list, multiprocessing_context={method!r}, timeout=60
    )
    got = [item for batch in loader for item in batch]
    assert got == [want] * 4
    assert op() == want
"""


@pytest.mark.parametrize("method", [pytest.param("fork", marks=needs_fork), "spawn"])
def test_ops_in_workers_of_a_data_loader(tmp_path, method):
    done = python(tmp_path, LOADED.format(method=method))
    assert done.returncode == 0, done.stderr
