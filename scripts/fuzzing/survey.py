"""Many examples of each kind, in processes of their own, so that a crash, a hang and much memory are seen."""

import gc
import logging
import multiprocessing
import resource
import threading
import time
import traceback
import warnings

import hypothesis
import hypothesis.strategies as st
import torch

from fuzzing.configurations import configuration, overrides
from fuzzing.files import checkpoint, checkpoint_content, idx, junk, mutations, picture, whole_pictures
from fuzzing.strangers import STRANGERS

SECONDS, MEBIBYTES = 2, 500  # that an example may take

PROPERTIES = {
    "configurations": (configuration, overrides()),
    "idx files": (idx, mutations()),
    "pictures": (picture, st.tuples(st.integers(0, 999), mutations(), st.booleans())),
    "checkpoints": (
        checkpoint,
        st.tuples(
            st.sampled_from(["bytes", "record", "record", "value", "value"]),
            st.integers(0, 99),
            mutations(),
            st.lists(st.integers(0, 99), min_size=1, max_size=6),
            junk,
        ),
    ),
    **STRANGERS,
}


def examine(what, count, seed):
    """Run a property `count` times; the processor's seconds of the slowest and the memory taken, in MiB."""
    torch.set_num_threads(1)
    check, strategy = PROPERTIES[what]
    slowest = 0.0
    whole_pictures(), checkpoint_content()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        print_blob=False,
    )
    @hypothesis.given(strategy)
    def each(example):
        nonlocal slowest
        for _ in range(3):  # a machine that stalls does not do so each time
            start = time.process_time()
            check(example)
            if (seconds := time.process_time() - start) < SECONDS:
                break
        slowest = max(slowest, seconds)
        assert seconds < SECONDS, f"{seconds:.1f} s"

    each()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEBIBYTES, f"{grown:.0f} MiB"
    return slowest, grown


def work(results, what, count, seed):
    gc.freeze()  # what the parent has made is not looked through again
    logging.disable()
    warnings.simplefilter("ignore")
    try:
        results.put((seed, None, *examine(what, count, seed)))
    except BaseException:
        results.put((seed, traceback.format_exc(limit=-4), 0.0, 0.0))


def in_thread(*arguments):
    """In a thread, whose stack begins anew: below a deep one CPython maps and unmaps memory at every call."""
    thread = threading.Thread(target=work, args=arguments)
    thread.start()
    thread.join()


def survey(what, count, seed, processes=2, patience=600):
    """`examine` shared among processes, so that a crash of the interpreter and a hang are seen as such.

    Returns the failures as text, the slowest example's seconds and the most MiB that a process took.
    """
    forked = multiprocessing.get_context("fork")  # torch is loaded already
    results = forked.Queue()
    counts = [count // processes + (index < count % processes) for index in range(processes)]
    checkpoint_content()
    workers = [forked.Process(target=in_thread, args=(results, what, n, seed + i)) for i, n in enumerate(counts)]
    for worker in workers:
        worker.start()
    finished, failures = [], []
    deadline = time.monotonic() + patience
    while len(finished) + len(failures) < len(workers):
        if not results.empty():
            finished.append(results.get())
        elif dead := [w for w in workers if w.exitcode not in (None, 0)]:
            failures = [f"a process ended with {worker.exitcode}" for worker in dead]
        elif time.monotonic() > deadline:
            failures = ["a process hangs"] * len(workers)
        else:
            time.sleep(0.05)
    for worker in workers:
        worker.kill()
        worker.join()
    failures += [f"seed {seed}:\n{reason}" for seed, reason, _, _ in finished if reason]
    return failures, max((e[2] for e in finished), default=0.0), max((e[3] for e in finished), default=0.0)
