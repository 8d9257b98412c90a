"""The benchmarks that every commit of the history is measured by, long after it was made: see ``measure.py --history``.

So these modules import no mbn and no framework, and ``_worker.py`` asks of mbn only its public interface, which no
commit has changed. A benchmark whose parameters change begins a new history.
"""
