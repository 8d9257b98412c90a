"""What is watched from commit to commit: speed, memory, agreement with the truth, and the frontend's own cost.

asv imports all of these modules in one process, so none of them may import a framework: only ``setup`` does, in the
process that asv starts for one benchmark with one set of parameters. So no two frameworks' threads are ever timed
together. Parameters must stay what they are, or the history of a benchmark ends.

What is measured is defined in ``mbn.commands.bench``, and so is the same as what ``mbn bench`` measures.
"""
