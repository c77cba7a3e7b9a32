#!/bin/sh
# Builds the compiled kernels beside their Python modules: kernels/libsat_cpu.so, and kernels/libsat_cuda.so where nvcc is found.
#   usage: sh compile.sh
#   environment: CXX (default g++, else clang++), CXXFLAGS (added last), PYTHON (used only where sha256sum is missing)
# Training runs without them too, on plain PyTorch, only slower.
set -u
LC_ALL=C
export LC_ALL

fail() {
    echo "compile.sh: $1" >&2
    exit 1
}

cd -- "$(dirname -- "$0")" || exit 1
target=kernels/libsat_cpu.so
without="training still runs, on the slower backend \`reference\`"

# 1. The compiler.
if [ -z "${CXX:-}" ]; then
    for candidate in g++ clang++; do
        if command -v "$candidate" >/dev/null 2>&1; then
            CXX=$candidate
            break
        fi
    done
    [ -n "${CXX:-}" ] || fail "no C++ compiler found: install g++ (Debian, Ubuntu: apt install g++) or set CXX; $without."
else
    # CXX may carry arguments ("ccache g++"): its first word must be there.
    command -v "${CXX%% *}" >/dev/null 2>&1 || fail "CXX=$CXX is not a program that can be run; $without."
fi

# 2. A place to write. Everything is built in a directory of its own and renamed at the end.
build=$(mktemp -d kernels/.build.XXXXXX 2>/dev/null) ||
    fail "cannot write into $(pwd)/kernels: run it as a user who may write there, or in a copy of the repository; $without."
trap 'rm -rf -- "$build"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

flags="-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math"
flags="$flags -Wall -Wextra -Wno-psabi -Wno-pass-failed"

# accepts FLAGS WIDTH CODE: whether a shared library with vectors of that width, threads and CODE can be built with them.
accepts() {
    cat >"$build/probe.cpp" <<END
#define SAT_ISA_NAMESPACE probe
#define SAT_WIDTH $2
#include "../csrc/cpu/parallel.h"
#include "../csrc/cpu/simd.h"
SAT_EXPORT void probe_all(float* p) {
    using namespace probe;
    parallel(2, [=] {
        vec x[W];
        for (int i = 0; i < W; ++i) x[i] = exp2(load(p + i));
        transpose(x);
        store(reinterpret_cast<bf16*>(p), total(x[0]) + x[W - 1]);
        $3;
    });
}
END
    # shellcheck disable=SC2086
    $CXX $flags $1 ${CXXFLAGS:-} -shared -o "$build/probe.so" "$build/probe.cpp" >"$build/probe.log" 2>&1
}

accepts "" 4 "" || {
    fail "$CXX cannot build a small library ($(grep -m 1 error "$build/probe.log" || head -n 1 "$build/probe.log")); $without."
}
version=$($CXX --version 2>/dev/null | head -n 1)
echo "compiler: $CXX ($version)"

# 3. What belongs to the library. kernels/native.py computes the same hash and refuses a library of other sources.
sources=$(echo kernels/csrc/cpu/*.cpp)
if command -v sha256sum >/dev/null 2>&1; then
    digest() { sha256sum | cut -d ' ' -f 1; }
else
    digest() { ${PYTHON:-python3} -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'; }
fi
# shellcheck disable=SC2086
hash=$(cat $sources kernels/csrc/cpu/*.h | digest)
[ -n "$hash" ] || fail "cannot compute a hash: install sha256sum or set PYTHON."

machine=$(uname -m)
avx512="-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512"
selected=""
for source in $sources; do
    case $source in
    *_avx2.cpp) isa=AVX2 needs="-mavx2 -mfma" width=8 uses="" ;;
    *_avx512.cpp) isa=AVX512 needs=$avx512 width=16 uses="" ;;
    *_avx512bf16.cpp) isa=AVX512BF16 needs="$avx512 -mavx512bf16" width=16 uses="" ;;
    *_amx.cpp) isa=AMX needs="$avx512 -mavx512bf16 -mamx-tile -mamx-bf16" width=16 uses="_tile_dpbf16ps(0, 1, 2)" ;;
    *)
        selected="$selected $source:"
        continue
        ;;
    esac
    case $machine in
    x86_64 | amd64) why="$CXX cannot compile for $isa with $needs" ;;
    *) why="this is $machine" needs="" ;;
    esac
    if [ -n "$needs" ] && accepts "$needs" "$width" "$uses"; then
        selected="$selected $source:$(echo "$needs" | tr ' ' ,)"
    else
        echo "left out: $source ($why)"
    fi
done

# 4. Up to date? The library carries the text that is looked for here.
build_id=$(echo "$hash $CXX $version $flags ${CXXFLAGS:-} $selected" | digest)
if [ -f "$target" ] && grep -q "SAT_BUILD=$build_id" "$target"; then
    echo "up to date: $target"
else
    # 5. Compile, all files at once; the first that fails ends it.
    jobs=""
    for entry in $selected; do
        source=${entry%%:*}
        object=$build/$(basename "$source" .cpp).o
        # shellcheck disable=SC2086
        $CXX $flags -DSAT_SOURCE_HASH="\"$hash\"" -DSAT_BUILD_ID="\"$build_id\"" \
            $(echo "${entry#*:}" | tr , ' ') ${CXXFLAGS:-} -c -o "$object" "$source" >"$object.log" 2>&1 &
        jobs="$jobs $!:$source"
    done
    for job in $jobs; do
        source=${job#*:}
        log=$build/$(basename "$source" .cpp).o.log
        if ! wait "${job%%:*}"; then
            for other in $jobs; do kill "${other%%:*}" 2>/dev/null; done
            cat "$log" >&2
            fail "$CXX stopped in $source, see above; $without."
        fi
        cat "$log" >&2
        echo "compiled: $source"
    done
    # Not linked to an OpenMP runtime: kernels/native.py hands it the one that torch has loaded (two in one process fight).
    # shellcheck disable=SC2086
    $CXX -shared ${CXXFLAGS:-} -o "$build/library.so" "$build"/*.o >"$build/link.log" 2>&1 || {
        cat "$build/link.log" >&2
        fail "$CXX could not link $target, see above; $without."
    }
    mv -f -- "$build/library.so" "$target" || fail "cannot replace $target."
    echo "built: $target"
fi

# 6. CUDA.
if [ ! -f kernels/csrc/cuda/build_cuda.sh ]; then
    :
elif command -v "${NVCC:-nvcc}" >/dev/null 2>&1; then
    sh kernels/csrc/cuda/build_cuda.sh || fail "the CUDA library was not built, see above; $target is complete."
else
    echo "left out: CUDA (no ${NVCC:-nvcc} on the PATH)"
fi
