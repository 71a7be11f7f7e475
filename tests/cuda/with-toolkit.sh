#!/usr/bin/env bash
# Runs a command with NVIDIA's CUDA compiler and libraries at hand, from PyPI, with no driver and no GPU:
#   tests/cuda/with-toolkit.sh cargo check -p freehold-engine --features cuda
# What results runs only where a driver of the 580 line or newer is, with CUDA 13's libraries.
# CUDA_COMPUTE_CAP picks the GPUs: 75, 80, 86, 89, 90 (the usual one here) or 120.
set -euo pipefail
folder="${FREEHOLD_CUDA:-${XDG_CACHE_HOME:-$HOME/.cache}/freehold/cuda}"
complete="$folder/complete-13.0"

if [ ! -e "$complete" ]; then
  mkdir -p "$folder"
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' \
    'nvidia-cuda-cccl==13.0.*' 'nvidia-cuda-nvrtc==13.0.*' 'nvidia-cublas<13.2' nvidia-curand
  prefix="$(echo "$folder"/venv/lib/python3*/site-packages/nvidia/cu13)"
  ln -sfn lib "$prefix/lib64"
  # The linker asks for names without a version.
  for library in cudart cublas cublasLt curand nvrtc; do
    versioned="$(ls "$prefix"/lib/lib$library.so.* | head -1)"
    ln -sfn "$(basename "$versioned")" "$prefix/lib/lib$library.so"
  done
  # libcuda comes with the driver alone: a stand-in with its name and symbols is linked against, and never
  # shipped. cuda.h renames some functions with _v2 to _v4, so each name is defined in all its forms.
  mkdir -p "$folder/stub"
  grep -ohE '\bcu[A-Z][A-Za-z0-9]+' "$prefix/include/cuda.h" | sort -u | awk '{
    for (i = 1; i <= 4; i++) print "void " $1 (i > 1 ? "_v" i : "") "(void) {}" }' > "$folder/stub/cuda.c"
  "${CC:-cc}" -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$folder/stub/libcuda.so.1" "$folder/stub/cuda.c"
  ln -sfn libcuda.so.1 "$folder/stub/libcuda.so"
  touch "$complete"
fi

prefix="$(echo "$folder"/venv/lib/python3*/site-packages/nvidia/cu13)"
export CUDA_PATH="$prefix" CUDA_HOME="$prefix" CUDA_ROOT="$prefix" CUDA_TOOLKIT_ROOT_DIR="$prefix"
export PATH="$prefix/bin:$PATH" LIBRARY_PATH="$prefix/lib:$folder/stub${LIBRARY_PATH:+:$LIBRARY_PATH}"
export CUDA_COMPUTE_CAP="${CUDA_COMPUTE_CAP:-90}"
exec "$@"
