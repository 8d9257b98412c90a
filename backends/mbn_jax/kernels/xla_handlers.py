"""Handlers of XLA's typed FFI, by which a program on the CPU calls the loops that Numba compiles, without Python.

XLA calls a handler with the address of a *frame*. ``xla/ffi/api/c_api.h``, which jaxlib ships, has its layout. Here a
struct is an array of 64-bit words::

    frame       size, extension, api, context, stage, arguments (5 words), results (5), attributes (6), ...
    arguments   size, extension, count, types*, buffers**            results are the same
    attributes  size, extension, count, types*, names**, values**
    buffer      size, extension, dtype, data*, rank, dims*
    api         size, extension, version (3 words), internal, then the functions

A size is the sender's own, in bytes. A newer struct has its new members at the end, so a size that is too small is the
only sign of another layout. When a handler is registered, XLA asks for the version of the interface that it was made
for, and refuses one that it does not support.

One handler serves all passes. Its only attribute, ``plan``, is the pass and the sizes of its chunks. A pass is a
function of a chunk. The thread that XLA calls takes one chunk after another; threads of XLA's pool, to which the
handler sends the same *job*, help it where they are free. The handler waits for chunks alone that another thread has
begun, never for a thread to begin: all threads of the pool may be waiting in handlers. A thread that comes later finds
no chunk left, so a job lives until the last thread has dropped it. Chunks, and the order in which their sums are added,
depend on the plan alone: results have the same bits for every number of threads.

The functions of a pass contain the loops that they call, so only ``callback`` caches them, which knows the files of
both.
"""

import mmap
from functools import cache
from typing import Any

import llvmlite.binding
import llvmlite.ir
import numba
import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from mbn_cpu.kernels import numba_loops
from mbn_cpu.kernels.numba_compilation import callback, pointer
from mbn_cpu.memory import LARGE

VERSION = 0, 3
"""The version of the interface, major and minor, that the layouts above are of."""
PLAN = 8
"""The words of a plan: the pass, whether channels come last, N, C, L, partial sums, samples of a chunk, and the number
of arguments without weights."""

_ARGUMENTS, _RESULTS, _ATTRIBUTES = 5, 10, 15
"""The places in a frame of three structs."""
_VERSION, _CREATE_ERROR, _DESTROY_ERROR, _SCHEDULE, _NUM_THREADS = 4, 6, 8, 17, 18
"""The places of the version and of functions in the interface."""
_FRAME, _API, _BUFFER = 8 * (_ATTRIBUTES + 6), 8 * (_NUM_THREADS + 1), 8 * 6
"""The least sizes of structs, in bytes."""
_METADATA = 1
"""The type of the extension that asks for the version."""
_INTERNAL = 13
"""The code of an error that is a bug."""
_LOW = 0xFFFFFFFF
"""A mask of the first of two 32-bit members of a word."""
_MESSAGE = np.frombuffer(b"the interface of XLA is not the one that mbn's handlers were made for\0", np.uint8)

_NEXT, _COUNT, _DONE, _USERS, _PARTIAL, _JOB_PLAN, _BUFFERS = 0, 1, 2, 3, 4, 5, 5 + PLAN
"""The places in a job: of the next chunk, the number of chunks, those that are done, the uses of the job, the address
of the sums of the chunks, the plan, and the addresses of the buffers."""
_WEIGHTS, _RESULT = 6, 7
"""The places among the buffers of a job."""
_JOB = _BUFFERS + 8
_SUMS = 3
"""Sums of a channel, of which the moments have two."""
_FIRST_WITHOUT_SUMS = 2
"""The number of the first pass that writes an array and no sums."""

_HUGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", -1)
_PAGE = mmap.PAGESIZE
_TABLE_NAME = "mbn_jax_passes"

_built: Any = intrinsic
_carray: Any = numba.carray  # type: ignore[attr-defined]
_malloc: Any = types.ExternalFunction("malloc", types.intp(types.intp))
_free: Any = types.ExternalFunction("free", types.void(types.intp))
_yield: Any = types.ExternalFunction("sched_yield", types.int32())
_madvise: Any = types.ExternalFunction("madvise", types.int32(types.intp, types.intp, types.int32))


@_built
def _call(typingctx: Any, function: Any, argument: Any) -> Any:
    """Call a C function by its address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = llvmlite.ir.IntType(64)
        kind = llvmlite.ir.FunctionType(word, [word]).as_pointer()
        return builder.call(builder.inttoptr(arguments[0], kind), [arguments[1]])

    return types.intp(types.intp, types.intp), codegen


@_built
def _fetch_add(typingctx: Any, address: Any, number: Any) -> Any:
    """Add to a word in one operation that no thread can interrupt, and return its former value."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], llvmlite.ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.intp(types.intp, types.intp), codegen


@_built
def _table(typingctx: Any) -> Any:
    """Return the address of the table of passes, which every process has elsewhere."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = llvmlite.ir.IntType(64)
        place = cgutils.get_or_insert_function(builder.module, llvmlite.ir.FunctionType(word, []), _TABLE_NAME)
        return builder.ptrtoint(place, word)

    return types.intp(), codegen


_inlined: Any = njit(nogil=True, error_model="numpy")


@_inlined
def _words(address, n):
    """Return n words at an address as an array."""
    return _carray(pointer(address), (n,), dtype=np.int64)


# The operands of a pass. The buffers of a job are its arguments, the weights at _WEIGHTS and the result at _RESULT.


@_inlined
def _values(job, buffer, i):
    """Return chunk i of an array of x's shape, as one axis."""
    first, cells = _cells(job, i)
    c = job[_JOB_PLAN + 3]
    return _carray(pointer(job[_BUFFERS + buffer] + 4 * first * c), (cells * c,), dtype=np.float32)


@_inlined
def _weights(job, i):
    """Return the sample weights of chunk i, in float64; they are empty where there are none."""
    address = job[_BUFFERS + _WEIGHTS]
    if address == 0:
        return np.empty(0)
    first, cells = _cells(job, i)
    return _carray(pointer(address + 4 * first), (cells,), dtype=np.float32).astype(np.float64)


@_inlined
def _cells(job, i):
    """Return the first cell of chunk i, and the number of its cells."""
    n, length, samples = job[_JOB_PLAN + 2], job[_JOB_PLAN + 4], job[_JOB_PLAN + 6]
    return i * samples * length, (min(n, (i + 1) * samples) - i * samples) * length


@_inlined
def _vector(job, buffer):
    """Return a vector of channels in float64."""
    return _carray(pointer(job[_BUFFERS + buffer]), (job[_JOB_PLAN + 3],), dtype=np.float64)


@_inlined
def _narrow_vector(job, buffer):
    """Return a vector of channels in float32."""
    return _carray(pointer(job[_BUFFERS + buffer]), (job[_JOB_PLAN + 3],), dtype=np.float32)


@_inlined
def _sizes(job):
    """Return arguments of the loops: whether channels come last, C, and L."""
    return job[_JOB_PLAN + 1] != 0, job[_JOB_PLAN + 3], job[_JOB_PLAN + 4]


@_inlined
def _sums(job, i):
    """Return the place for the sums of chunk i, three vectors of channels."""
    c = job[_JOB_PLAN + 3]
    return _carray(pointer(job[_PARTIAL] + 8 * _SUMS * c * i), (_SUMS, c), dtype=np.float64)


# A thread's share of a job.


@_inlined
def _next(address, job):
    """Return the number of a chunk that no thread has taken; a negative number if there is none."""
    # From the end, so that the number is negative where no chunk is left. Sums from the start were not faster.
    return job[_COUNT] - 1 - _fetch_add(address + 8 * _NEXT, 1)


@_inlined
def _done(address):
    """Note that a chunk is done."""
    _fetch_add(address + 8 * _DONE, 1)


@_inlined
def _drop(address):
    """End the use of a job by a thread."""
    if _fetch_add(address + 8 * _USERS, -1) == 1:
        _free(address)
    return 0


def moments(address):
    """Write sums of chunks: of x - center and of its squares. The arguments are x and center."""
    job = _words(address, _JOB)
    (last, c, length), partials = _sizes(job), job[_JOB_PLAN + 5]
    i = _next(address, job)
    while i >= 0:
        numba_loops.shifted_sums(
            _values(job, 0, i), _weights(job, i), last, c, length, partials, _vector(job, 1), _sums(job, i)
        )
        _done(address)
        i = _next(address, job)
    return _drop(address)


def grad_sums(address):
    """Write sums of chunks: of dy, of dy * (x - center), and of x - center. The arguments are dy, x and center."""
    job = _words(address, _JOB)
    (last, c, length), partials = _sizes(job), job[_JOB_PLAN + 5]
    i = _next(address, job)
    while i >= 0:
        dy, x, w = _values(job, 0, i), _values(job, 1, i), _weights(job, i)
        center, sums, of_x = _vector(job, 2), _sums(job, i), np.empty((2, c))
        numba_loops.gradient_sums(dy, x, w, last, c, length, partials, center, sums)
        numba_loops.shifted_sums(x, w, last, c, length, partials, center, of_x)
        sums[2] = of_x[0]
        _done(address)
        i = _next(address, job)
    return _drop(address)


def normalize(address):
    """Write the output of chunks, (x - center) * scale + shift. The arguments are x and these three vectors."""
    job = _words(address, _JOB)
    last, c, length = _sizes(job)
    i = _next(address, job)
    while i >= 0:
        vectors = _narrow_vector(job, 1), _narrow_vector(job, 2), _narrow_vector(job, 3)
        numba_loops.normalize(_values(job, 0, i), _weights(job, i), _values(job, _RESULT, i), last, c, length, *vectors)
        _done(address)
        i = _next(address, job)
    return _drop(address)


def grad_input(address):
    """Write the gradient of x of chunks. The arguments are dy, x and the four vectors of ``input_gradient``."""
    job = _words(address, _JOB)
    last, c, length = _sizes(job)
    i = _next(address, job)
    while i >= 0:
        arrays = _values(job, 0, i), _values(job, 1, i), _weights(job, i), _values(job, _RESULT, i)
        vectors = _vector(job, 2), _vector(job, 3), _vector(job, 4), _vector(job, 5)
        numba_loops.input_gradient(*arrays, last, c, length, *vectors)
        _done(address)
        i = _next(address, job)
    return _drop(address)


PASSES = moments, grad_sums, normalize, grad_input
"""The passes, by their numbers in a plan."""
_TABLE = np.zeros(len(PASSES), np.int64)
"""Their addresses in this process, which the handler finds by a name."""


# The handler.


@_inlined
def _error(api):
    """Return an error of XLA's."""
    given = np.zeros(4, np.int64)
    given[0], given[2], given[3] = 8 * 4, _MESSAGE.ctypes.data, _INTERNAL
    return _call(api[_CREATE_ERROR], given.ctypes.data)


@_inlined
def _is_refused(api, error):
    """Tell whether a function of XLA's has returned an error, and drop the error."""
    if error == 0:
        return False
    given = np.zeros(3, np.int64)
    given[0], given[2] = 8 * 3, error
    _call(api[_DESTROY_ERROR], given.ctypes.data)
    return True


@_inlined
def _num_threads(api, context):
    """Return the number of threads of XLA's pool; 0 if there is no pool."""
    number, given = np.zeros(1, np.int64), np.zeros(4, np.int64)
    given[0], given[2], given[3] = 8 * 4, context, number.ctypes.data
    return 0 if _is_refused(api, _call(api[_NUM_THREADS], given.ctypes.data)) else number[0]


@_inlined
def _is_scheduled(api, context, work, job):
    """Send a job to XLA's pool, and tell whether the pool has taken it."""
    given = np.zeros(5, np.int64)
    given[0], given[2], given[3], given[4] = 8 * 5, context, work, job
    return not _is_refused(api, _call(api[_SCHEDULE], given.ctypes.data))


@_inlined
def _is_known(frame, api):
    """Tell whether structs are at least as large as the layouts at the top of this file, and the version is theirs."""
    if api[0] < _API or (api[_VERSION] & _LOW) != VERSION[0]:
        return False
    if frame[_ARGUMENTS] < 40 or frame[_RESULTS] < 40 or frame[_ATTRIBUTES] < 48 or frame[_ATTRIBUTES + 2] != 1:
        return False
    for start in (_ARGUMENTS, _RESULTS):
        buffers = _words(frame[start + 4], frame[start + 2])
        for i in range(frame[start + 2]):
            if _words(buffers[i], 1)[0] < _BUFFER:
                return False
    return True


@_inlined
def _answer(frame):
    """Answer XLA's question for the version, and tell whether it was asked. Answer -1 if the structs are others."""
    if frame[1] == 0:
        return False
    extension = _words(frame[1], 4)
    if (extension[1] & _LOW) != _METADATA:
        return False
    metadata = _words(extension[3], 4)
    is_known = frame[0] >= _FRAME and extension[0] >= 32 and metadata[0] >= 32
    metadata[3] = VERSION[0] | (VERSION[1] << 32) if is_known else -1
    return True


@_inlined
def _request_huge_pages(address, size):
    """Request huge pages for an output, as ``mbn_cpu.memory`` does."""
    if _HUGE_PAGES >= 0 and size >= LARGE:
        start = -(-address // _PAGE) * _PAGE
        _madvise(start, (address + size - start) // _PAGE * _PAGE, _HUGE_PAGES)


@_inlined
def _fold(sums, count):
    """Write the sum of the chunks' sums to the first: the second half is added to the first, until one is left."""
    while count > 1:
        half = (count + 1) // 2
        for i in range(half, count):
            sums[i - half] += sums[i]
        count = half


def handler(address):
    """Execute the pass of a frame, and return 0, or XLA's error if the frame has another layout."""
    frame = _words(address, _FRAME // 8)
    if _answer(frame):
        return 0
    api, context = _words(frame[2], _API // 8), frame[3]
    if not _is_known(frame, api):
        return _error(api)
    plan = _words(_words(_words(frame[_ATTRIBUTES + 5], 1)[0], 3)[2], PLAN)
    kind, n, c, length, samples, num_arguments = plan[0], plan[2], plan[3], plan[4], plan[6], plan[7]
    count = -(-n // samples)
    is_sum = kind < _FIRST_WITHOUT_SUMS
    partial = np.empty((count, _SUMS, c) if is_sum else (0, _SUMS, c))
    given = _malloc(8 * _JOB)
    job = _words(given, _JOB)
    job[:] = 0
    job[_COUNT], job[_PARTIAL] = count, partial.ctypes.data
    job[_JOB_PLAN : _JOB_PLAN + PLAN] = plan
    arguments, results = _words(frame[_ARGUMENTS + 4], frame[_ARGUMENTS + 2]), _words(frame[_RESULTS + 4], 1)
    for i in range(arguments.size):
        job[_BUFFERS + (i if i < num_arguments else _WEIGHTS)] = _words(arguments[i], _BUFFER // 8)[3]
    result = _words(results[0], _BUFFER // 8)[3]
    job[_BUFFERS + _RESULT] = result
    if not is_sum:
        _request_huge_pages(result, 4 * n * c * length)
    work = _words(_table(), _FIRST_WITHOUT_SUMS + 2)[kind]
    helpers = max(min(_num_threads(api, context), count) - 1, 0)
    job[_USERS] = helpers + 2
    for _ in range(helpers):
        if not _is_scheduled(api, context, work, given):
            _drop(given)
    _call(work, given)
    while _fetch_add(given + 8 * _DONE, 0) < count:
        _yield()
    _drop(given)
    if is_sum:
        _fold(partial, count)
        sums = _carray(pointer(result), (_SUMS, c), dtype=np.float64)
        sums[:] = partial[0]
    return 0


@cache
def address_of_pass(number: int) -> int:
    """Compile a pass, or load it from the cache, and return the address of the handler."""
    _TABLE[number] = callback(PASSES[number], numba_loops)
    return _address_of_handler()


@cache
def _address_of_handler() -> int:
    llvmlite.binding.add_symbol(_TABLE_NAME, _TABLE.ctypes.data)
    return callback(handler)
