#!/usr/bin/env bash
# Sets up fstq-infer on a Jetson with JetPack 6 (Jetson Linux 36) or JetPack 7 (38, 39): a virtual environment that sees
# JetPack's TensorRT, and ONNX Runtime, with its GPU provider where an index of wheels for Jetson is given.
set -euo pipefail

readonly RELEASE_FILE=${NV_TEGRA_RELEASE:-/etc/nv_tegra_release}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$HOME/fstq-venv
source_=$(dirname "$here")
index=
runtime_version=
python=python3
dry_run=0
force=0

usage() {
  cat <<'EOF'
usage: jetson/install.sh [options]

  --venv DIR            where the virtual environment goes (default: ~/fstq-venv)
  --source WHAT         what pip installs: a checkout, a wheel, or a requirement (default: this checkout)
  --wheel-index URL     index with onnxruntime-gpu for this JetPack, Python and CUDA; without it ONNX Runtime for the CPU
  --runtime-version V   version of onnxruntime-gpu to take from that index (default: its newest)
  --python PROGRAM      interpreter to make the environment with (default: python3)
  --dry-run             print the commands, run none of them
  --force               go on where this does not look like a supported Jetson
  -h, --help            this text
EOF
}

die() {
  echo "error: $*" >&2
  exit 1
}

doubt() {
  [ "$force" = 1 ] || die "$*; --force goes on"
  echo "warning: $*" >&2
}

run() {
  echo "+ $*"
  [ "$dry_run" = 1 ] || "$@"
}

value() {
  [ $# -ge 2 ] || die "$1 needs a value; see --help"
  printf '%s' "$2"
}

while [ $# -gt 0 ]; do
  case $1 in
    --venv) venv=$(value "$@") ;;
    --source) source_=$(value "$@") ;;
    --wheel-index) index=$(value "$@") ;;
    --runtime-version) runtime_version=$(value "$@") ;;
    --python) python=$(value "$@") ;;
    --dry-run) dry_run=1 && shift && continue ;;
    --force) force=1 && shift && continue ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2 && die "there is no option $1" ;;
  esac
  shift 2
done

[ "$(id -u)" != 0 ] || doubt "running as root: the environment would belong to root"
[ "$(uname -m)" = aarch64 ] || doubt "this machine is $(uname -m), expected aarch64"

major=$(sed -n 's/^# R\([0-9]*\) (release).*/\1/p' "$RELEASE_FILE" 2>/dev/null || true)
case $major in
  36) jetpack=6 ;;
  38 | 39) jetpack=7 ;;
  '') jetpack=unknown && doubt "$RELEASE_FILE does not name a release of Jetson Linux" ;;
  *) jetpack=unknown && doubt "Jetson Linux $major is not supported, expected 36 (JetPack 6), 38 or 39 (JetPack 7)" ;;
esac
echo "Jetson Linux ${major:-unknown}, JetPack $jetpack"

command -v "$python" >/dev/null || die "$python is not there; sudo apt install python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$python is older than 3.10"

# --system-site-packages: TensorRT's Python module comes with JetPack and is on no index.
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  run sudo apt-get install -y python3-venv python3-pip
fi
if ! "$python" -c 'import tensorrt' 2>/dev/null; then
  echo "warning: $python cannot import tensorrt; 'sudo apt install nvidia-jetpack' brings it" >&2
fi
run "$python" -m venv --system-site-packages "$venv"
pip=("$venv/bin/python" -m pip install)
run "${pip[@]}" --upgrade pip

# TensorRT engines run by cuda-python. That of CUDA 12 works with newer drivers, that of CUDA 13 not with JetPack 6's.
cuda_python='cuda-python<13'
[ "$jetpack" != 7 ] || cuda_python=cuda-python

# onnxruntime and onnxruntime-gpu share one folder: only one of them, ever.
if [ -n "$index" ]; then
  run "${pip[@]}" --no-deps --index-url "$index" "onnxruntime-gpu${runtime_version:+==$runtime_version}"
  run "${pip[@]}" "${source_}[ort-gpu,tensorrt]" "$cuda_python"
else
  echo "no --wheel-index: ONNX Runtime for the CPU; TensorRT engines need no other"
  run "${pip[@]}" "${source_}[ort,tensorrt]" "$cuda_python"
fi

if [ "$dry_run" = 1 ]; then
  echo "+ $venv/bin/fstq doctor"
else
  "$venv/bin/fstq" doctor || echo "the doctor found errors, see above" >&2
fi
echo "done: source $venv/bin/activate"
