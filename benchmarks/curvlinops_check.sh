#!/usr/bin/env bash
# EK-FAC beside curvlinops 3.0.1, in an environment of its own that is deleted afterwards: bash benchmarks/curvlinops_check.sh
#
# Never in .venv: curvlinops lists backpack, which lists torchvision, whose presence breaks diffusers with the CPU build of
# torch. It is not imported for what is compared, so that they are installed without what they list.
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/env"
install=("$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check -c "$here/constraints.txt")
index=(--extra-index-url https://download.pytorch.org/whl/cpu)
"${install[@]}" --retries 1 "${index[@]}" torch==2.13.0
"${install[@]}" numpy scipy scikit-learn tqdm einops einconv opt_einsum safetensors pillow pyarrow
"${install[@]}" --no-deps curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1 linear_operator==0.6 jaxtyping==0.3.11
"${install[@]}" --no-deps setuptools wheel
cp -r "$here/src" "$here/pyproject.toml" "$here/LICENSE" "$folder/"  # the build writes beside its source
"${install[@]}" --no-deps --no-build-isolation "$folder"
OMP_NUM_THREADS=1 "$folder/env/bin/python" "$here/benchmarks/curvlinops_check.py"
