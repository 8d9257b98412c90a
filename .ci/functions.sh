# Functions of `.ci/run`; `.ci/run` sources this file, and so do its tests.

# Print a command of the README: the first line of its shell block number $1, which has to contain $2.
readme_command() {
    local command
    command=$(awk -v wanted="$1" '/^```sh$/ && ++block == wanted {getline; print; exit}' README.md)
    if [[ $command != *"$2"* ]]; then
        echo "README.md has no command with '$2' in its shell block $1, but: '$command'" >&2
        return 1
    fi
    echo "$command"
}

fresh_environment() {
    python3 -m venv "$1" || return
    export PATH="$1/bin:$PATH"
}

# Install the browser in which tests open pages, where there is none.
browser() {
    if ! command -v chromium >/dev/null; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium
    fi
}

# Measure which lines and branches of the frontend and of the CPU's backends their tests execute, print the figures, and
# fail below either floor. Left out are tests of processes that may write no file: coverage writes one at their end.
coverage_with_floors() {
    coverage erase || return
    coverage run -m pytest -n auto --dist worksteal tests/{chunked,commands,contract,interop,replicas,state,step} \
        tests/test_{array_api,array_libraries,convert,handing_over,hooks,layer,public_api,registry,threads}.py \
        tests/backends/test_{mbn_cpu,mbn_numba,mpi_replicas,replicas}.py -k "not full_disk_leads and not works_without_the_cache" || return
    coverage run -m mbn conform numpy -n auto || return
    coverage run -m mbn conform numba -n auto || return
    find . -maxdepth 1 -name '.coverage.*' -empty -delete # those of processes that a test has killed
    coverage combine --quiet || return
    echo "The frontend, at least 98 %:"
    coverage report --include '*/mbn/*' --fail-under 98 || return
    echo "The CPU's backends, at least 95 %:"
    coverage report --include '*/backends/*' --fail-under 95
}

# Two backends, on a small and on a large input.
quick="Step.*'(numpy|numba)'.*'\((32, 64|65536, 256)\)'"

quick_check() {
    asv --config asv.quick.json continuous --factor 1.5 --interleave-rounds -a rounds=3 --bench "$quick" HEAD~1 HEAD
}

# Succeed if the commit $1 can run the benchmarks of the quick check.
can_be_measured() {
    asv --config asv.quick.json run --quick --bench "$quick" "$1^!"
}

# Fail if HEAD is slower than the commit before it, or cannot be measured. asv returns 1 if HEAD is slower, and 2 if
# either commit fails or asv was called wrongly.
no_regression() {
    local status=0
    quick_check || status=$?
    if [ "$status" -eq 2 ] && can_be_measured HEAD && ! can_be_measured HEAD~1; then
        echo "The commit before HEAD cannot run these benchmarks, so there is nothing to compare with."
        return 0
    fi
    return "$status"
}
