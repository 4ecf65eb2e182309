"""Measure: ``python tests/benchmark --help``. Speeds are ratios within one run, never absolute.

``cli``
    The commands and their arguments.
``matrix``
    Every row beside the peer, on every kind of set and directory; ``metadata`` is the same with
    other contenders.
``alternation``
    Rows run in turn for each contender, and what each run gave.
``replicas``, ``sizes``, ``memory``, ``resync``, ``replacing``
    Other questions, asked in the same way.
``profiling``, ``sampler``
    Where our daemon's time goes in one row.
``contenders``, ``nullfs``
    The ways to have a disk: QEMU's quorum driver, quorumfs, and the floors.
``rows``, ``fio``, ``processes``, ``machine``
    What is run, how, and what is read of it.
``interrupts``
    Ctrl-C, at a good moment.
``summary``, ``table``, ``chart``, ``saving``
    From runs to medians, a table, an SVG and JSON.
"""
