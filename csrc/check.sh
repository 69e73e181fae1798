#!/usr/bin/env bash
# Compiles every kernel for every architecture, without a GPU and without torch.
# Usage: csrc/check.sh [folder of the CUTLASS headers]
set -euo pipefail
cd "$(dirname "$0")"
command -v nvcc >/dev/null || { echo "csrc/check.sh: nvcc is not on the PATH, nothing checked"; exit 0; }
python=${PYTHON:-python3}
cutlass=${1:-$($python -c 'import importlib.util as u; print(u.find_spec("cutlass_library").submodule_search_locations[0])')/source/include}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

compile() {
  nice nvcc -std=c++17 -O3 -arch="$2" -I "$cutlass" -Werror all-warnings -Xptxas -v -c "$1.cu" -o "$out/$1.$2.o" >"$out/log.$1.$2" 2>&1 ||
    { cat "$out/log.$1.$2"; exit 1; }
  printf '%-12s %-7s %s\n' "$1" "$2" "$(grep -oE 'Used [0-9]+ registers|[0-9]+ bytes spill stores' "$out/log.$1.$2" | paste -sd' ')"
}
export -f compile
export cutlass out

for kernel in *.cu; do
  for arch in sm_80 sm_86 sm_90a; do echo "${kernel%.cu} $arch"; done
done | xargs -P "${JOBS:-2}" -L 1 bash -c 'compile "$@"' _
