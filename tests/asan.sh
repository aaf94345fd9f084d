#!/bin/sh
# Builds the kernels with AddressSanitizer and UBSan into build/asan and runs the kernel tests on them.
# torch itself is not instrumented, so leaks are not looked for, and the runtimes have to be preloaded.
# Usage: [PYTHON=.venv/bin/python] tests/asan.sh [pytest arguments]
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
FASTNN_SANITIZE=address,undefined "$python" setup.py -q build_ext --build-lib build/asan --build-temp build/asan-temp
for file in $(cd fastnn && find . -name '*.py'); do
  mkdir -p "build/asan/fastnn/$(dirname "$file")"
  cp "fastnn/$file" "build/asan/fastnn/$file"
done
compiler=${CXX:-g++}
export LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONPATH="$PWD/build/asan" FASTNN_EXPECT_SANITIZER=1
exec "$python" -P -m pytest -m kernels -p no:cacheprovider "$@"
