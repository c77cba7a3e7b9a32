#!/bin/sh
# Builds kernels/libsat_cuda.so with nvcc; called by compile.sh.
#   usage: sh kernels/csrc/cuda/build_cuda.sh
#   environment: NVCC (default nvcc), NVCCFLAGS (added last)
#     SAT_CUDA_ARCHS  for example "75 80 86 89 90 100 120": code for each, and PTX of the last for newer ones.
#                     Default: the GPUs of this machine; without one 80 (A100), 90 (H100) and PTX for newer ones.
# What ptxas says of registers and spills is kept in kernels/libsat_cuda.ptxas.txt.
set -u
LC_ALL=C
export LC_ALL

fail() {
    echo "build_cuda.sh: $1" >&2
    exit 1
}

cd -- "$(dirname -- "$0")/../../.." || exit 1
target=kernels/libsat_cuda.so
report=kernels/libsat_cuda.ptxas.txt
NVCC=${NVCC:-nvcc}
command -v "${NVCC%% *}" >/dev/null 2>&1 || fail "$NVCC is not a program that can be run: install the CUDA toolkit or set NVCC."
version=$($NVCC --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\).*/\1/p')

build=$(mktemp -d kernels/.build.XXXXXX 2>/dev/null) || fail "cannot write into $(pwd)/kernels."
trap 'rm -rf -- "$build"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# 1. For which GPUs.
archs=${SAT_CUDA_ARCHS:-}
if [ -n "$archs" ]; then
    from=SAT_CUDA_ARCHS
else
    archs=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -dc '0-9\n' | sort -nu | tr '\n' ' ')
    from="the GPUs of this machine"
    [ -n "${archs%% }" ] || archs="80 90" from="no GPU found"
fi
gencode=""
for arch in $archs; do
    case $arch in
    *[!0-9]*) fail "SAT_CUDA_ARCHS=\"$archs\": $arch is not a number such as 80." ;;
    esac
    [ "$arch" -ge 75 ] || fail "the kernels need compute capability 7.5 or newer, not $arch."
    gencode="$gencode -gencode arch=compute_$arch,code=sm_$arch"
done
gencode="$gencode -gencode arch=compute_$arch,code=compute_$arch"
echo "CUDA: $NVCC $version for sm_$(echo $archs | sed 's/ /, sm_/g') and PTX ($from)"

# 2. Up to date? kernels/cuda.py computes the same hash and refuses a library of other sources.
if command -v sha256sum >/dev/null 2>&1; then
    digest() { sha256sum | cut -d ' ' -f 1; }
else
    digest() { ${PYTHON:-python3} -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'; }
fi
hash=$(cat kernels/csrc/cuda/*.cu kernels/csrc/cuda/*.cuh | digest)
[ -n "$hash" ] || fail "cannot compute a hash: install sha256sum or set PYTHON."
flags="-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra -Xptxas -v"
build_id=$(echo "$hash $NVCC $version $flags $gencode ${NVCCFLAGS:-}" | digest)
if [ -f "$target" ] && [ -f "$report" ] && grep -q "SAT_BUILD=$build_id" "$target"; then
    echo "up to date: $target"
    exit 0
fi

# 3. Compile, all files at once; the first that fails ends it.
jobs=""
for source in kernels/csrc/cuda/*.cu; do
    object=$build/$(basename "$source" .cu).o
    # shellcheck disable=SC2086
    $NVCC $flags $gencode -DSAT_SOURCE_HASH="\"$hash\"" -DSAT_BUILD_ID="\"$build_id\"" ${NVCCFLAGS:-} \
        -c -o "$object" "$source" >"$object.log" 2>&1 &
    jobs="$jobs $!:$source"
done
for job in $jobs; do
    source=${job#*:}
    log=$build/$(basename "$source" .cu).o.log
    if ! wait "${job%%:*}"; then
        for other in $jobs; do kill "${other%%:*}" 2>/dev/null; done
        grep -v '^ptxas info' "$log" >&2
        fail "$NVCC stopped in $source, see above."
    fi
    # ptxas speaks of each kernel; anything else is a warning and belongs on the screen.
    grep -v -e '^ptxas info' -e 'bytes stack frame' "$log" >&2
    echo "compiled: $source"
done
# shellcheck disable=SC2086
$NVCC -shared -cudart static $gencode -o "$build/library.so" "$build"/*.o >"$build/link.log" 2>&1 || {
    cat "$build/link.log" >&2
    fail "$NVCC could not link $target, see above."
}
cat "$build"/*.o.log >"$build/report"
mv -f -- "$build/report" "$report" && mv -f -- "$build/library.so" "$target" || fail "cannot replace $target."
echo "built: $target"
