#!/bin/sh
# Builds the kernels with AddressSanitizer and UBSan into build/asan and runs the kernel tests on them.
# torch itself is not instrumented: the runtimes are preloaded, and leaks are not looked for.
# --capture=sys leaves the sanitizers' own reports on the terminal.
# Usage: [PYTHON=.venv/bin/python] tests/asan.sh [pytest options]
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
compiler=${CXX:-g++}
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac

cd "$root"
FASTNN_SANITIZE=address,undefined "$python" setup.py -q build_ext --build-lib build/asan --build-temp build/asan-temp
(cd fastnn && find . -name '*.py' -exec cp --parents {} "$root/build/asan/fastnn" \;)

# The sanitized package first, then what some tests import from the repository's root.
cd build/asan
export PYTHONPATH="$root/build/asan:$root"
LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)"
export LD_PRELOAD ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
"$python" -c "import fastnn; assert '/build/asan/' in fastnn._C.__file__, fastnn._C.__file__"
exec "$python" -m pytest -m kernels --capture=sys -p no:cacheprovider -c "$root/pyproject.toml" "$root/tests" "$@"
