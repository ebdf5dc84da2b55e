#!/usr/bin/env bash
# Compares the engines on this device with PyTorch's outputs, through Polygraphy. See README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
HERE=$PWD

usage() {
  cat <<'TEXT'
usage: ./verify.sh [options]

Runs every engine on the kit's golden inputs and compares what comes out with what PyTorch computed, through
Polygraphy and with the tolerances of golden/*.tolerances (each file says why they are as they are).

  --case NAME     this case only; may repeat. ./verify.sh --list names them
  --list          name the cases and end
  --onnxrt        compare the kit's ONNX files in ONNX Runtime instead of the engines: needs no GPU, and tells
                  whether the kit itself is sound
  --skip-checksums, -h, --help

environment:
  PYTHON          a Python 3 with polygraphy, numpy and tensorrt (with --onnxrt: onnxruntime) [python3]

exit codes: 0 all cases agree, 1 could not be compared, 2 usage, 3 compared and different
TEXT
}

fail() { # MESSAGE [HINT]
  printf 'error: %s\n' "$1" >&2
  if [[ -n ${2:-} ]]; then printf 'hint: %s\n' "$2" >&2; fi
  exit 1
}
misused() {
  printf 'error: %s\nhint: ./verify.sh --help\n' "$1" >&2
  exit 2
}

BACKEND=trt LIST=0 CHECKSUMS=1 PYTHON=${PYTHON:-python3}
WANTED=()
while (($#)); do
  case $1 in
    --case)
      if (($# < 2)); then misused "--case needs a name"; fi
      WANTED+=("$2")
      shift
      ;;
    --list) LIST=1 ;;
    --onnxrt) BACKEND=onnxrt ;;
    --skip-checksums) CHECKSUMS=0 ;;
    -h | --help) usage; exit 0 ;;
    *) misused "unknown option $1" ;;
  esac
  shift
done

if [[ ! -f SHA256SUMS ]]; then fail "$HERE is no whole kit: SHA256SUMS is missing" "copy the kit again, whole"; fi
kept=.
if ((!CHECKSUMS)); then kept='  [^/]*$\|  kit/\|  golden/'; fi
if ! wrong=$(grep -e "$kept" SHA256SUMS | LC_ALL=C sha256sum --check --quiet - 2>/dev/null); then
  wrong=$(sed -n '1s/: FAILED.*//p' <<<"$wrong")
  fail "${wrong:-a file} is missing or was changed: its SHA-256 differs from SHA256SUMS" "copy the kit again, whole"
fi
# shellcheck source=/dev/null
source kit/settings.sh
ENGINES=engines/$TARGET
KIT_TORCH=0
if [[ $PRECISION == bf16 ]]; then KIT_TORCH=1; fi
export KIT_TORCH

if [[ ! -s golden/cases.tsv ]]; then
  fail "this kit has no golden files: there is nothing to compare with" \
    "make it again where the checkpoint is, without --no-golden"
fi
if ((LIST)); then
  cut -f 1 golden/cases.tsv
  exit 0
fi
for name in ${WANTED[@]+"${WANTED[@]}"}; do
  if ! cut -f 1 golden/cases.tsv | grep -qxF -- "$name"; then misused "there is no case $name: see --list"; fi
done

# --- what it needs ----------------------------------------------------------------------------------------------
needs() { # MODULE HINT
  if ! "$PYTHON" -c "import $1" 2>/dev/null; then fail "$PYTHON has no module $1" "$2"; fi
}
needs numpy "$PYTHON -m pip install numpy"
needs polygraphy "$PYTHON -m pip install polygraphy==$POLYGRAPHY_VERSION"
if [[ $BACKEND == onnxrt ]]; then
  needs onnxruntime "$PYTHON -m pip install onnxruntime"
  if [[ $PRECISION == bf16 ]]; then
    fail "ONNX Runtime computes no bfloat16 on a CPU" "run ./verify.sh on the device, after ./build.sh"
  fi
else
  needs tensorrt "on a Jetson: sudo apt install python3-libnvinfer; elsewhere the package of the TensorRT that built the engines"
  if [[ $PRECISION == bf16 ]]; then
    needs torch "NumPy has no bfloat16, so Polygraphy takes it from PyTorch: $PYTHON -m pip install torch (the CPU build will do)"
  fi
  if [[ ! -f $ENGINES/engine.json ]]; then fail "the engines are not all built: $ENGINES/engine.json is missing" "./build.sh"; fi
  "$PYTHON" kit/write_record.py --check "$ENGINES" || exit 1
fi

# --- the cases --------------------------------------------------------------------------------------------------
mkdir -p logs
polygraphy_run() { # CASE COMPONENT PROFILE LOG OPTIONS...: Polygraphy's own command, `polygraphy run`
  local case=$1 component=$2 profile=$3 log=$4
  shift 4
  local -a what=(run)
  if [[ $BACKEND == onnxrt ]]; then
    what+=("$component.onnx" --model-type onnx --onnxrt)
  else
    what+=("$ENGINES/$component.engine" --model-type engine --trt --optimization-profile "$profile")
  fi
  if [[ $PRECISION == bf16 ]]; then
    what+=(--data-loader-script kit/load_inputs.py)
  else
    what+=(--load-inputs "golden/$case.inputs.json")
  fi
  KIT_INPUTS=golden/$case.inputs.json KIT_PLUGIN=$ENGINES/libep_entropy_prune.so \
    "$PYTHON" kit/polygraphy_run.py "${what[@]}" "$@" >"$log" 2>&1
}

used() { # LOG: how much of what is allowed the worst output of a case needs
  awk '
    match($0, /abs=[0-9.e+-]+/) { value = substr($0, RSTART + 4, RLENGTH - 4) + 0 }
    /Tolerance: \[abs=/ && !/Minimum/ { allowed = value }
    /Minimum Required Tolerance/ {
      share = allowed > 0 ? value / allowed : (value > 0)
      if (share > most) most = share
      seen = 1
    }
    END { if (seen) printf "at most %.2g%% of the allowed difference", 100 * most }' "$1"
}

DIFFERENT=0 BROKEN=0
show() { printf '%-9s %-32s %s\n' "$1" "$2" "$3"; }

compare_case() { # CASE COMPONENT PROFILE
  local case=$1 component=$2 profile=$3 log=logs/verify-$1.log verdict=PASS note="" status=0
  local wanted=golden/$case.outputs.json
  local -a atol
  mapfile -t atol < <(grep -v '^#' "golden/$case.tolerances")
  if [[ -f golden/$case.choice.json ]]; then
    # Which tokens the device keeps may differ by near-ties, and everything after them then differs too. So its
    # choice is judged first, and the rest is compared given that choice.
    rm -f "logs/$case.got.json" "logs/$case.wanted.json"
    if ! polygraphy_run "$case" "$component" "$profile" "$log" --save-outputs "logs/$case.got.json"; then
      show ERROR "$case" "Polygraphy could not run it: $log"
      BROKEN=1
      return
    fi
    note=$("$PYTHON" kit/check_choice.py "golden/$case.choice.json" "golden/$case.inputs.json" "$wanted" \
      "logs/$case.got.json" "logs/$case.wanted.json" 2>>"$log") || status=$?
    if ((status == 3)); then
      show FAIL "$case" "$note"
      DIFFERENT=1
      return
    elif ((status)); then
      show ERROR "$case" "its kept set could not be read: $log"
      BROKEN=1
      return
    fi
    if [[ $note == *near-tie* ]]; then verdict=AMBIGUOUS; fi
    wanted=logs/$case.wanted.json
  fi
  if polygraphy_run "$case" "$component" "$profile" "$log" --load-outputs "$wanted" \
    --check-error-stat max --rtol 0 --atol "${atol[@]}"; then
    show "$verdict" "$case" "$(used "$log")${note:+; $note}"
  elif grep -q 'FAILED |' "$log"; then
    show FAIL "$case" "$(grep -o "Mismatched outputs: .*" "$log" | head -n 1) ($log)"
    DIFFERENT=1
  else
    show ERROR "$case" "Polygraphy could not run it: $log"
    BROKEN=1
  fi
}

while IFS=$'\t' read -r case component profile; do
  if ((${#WANTED[@]})) && [[ " ${WANTED[*]} " != *" $case "* ]]; then continue; fi
  compare_case "$case" "$component" "$profile"
done <golden/cases.tsv
if ((!${#WANTED[@]})); then
  for component in $COMPONENT_NAMES; do
    if ! cut -f 2 golden/cases.tsv | grep -qxF -- "$component"; then
      show SKIPPED "$component" "this kit has no golden inputs for it"
    fi
  done
fi
if ((BROKEN)); then fail "some cases could not be compared" "read the logs named above"; fi
if ((DIFFERENT)); then
  printf 'FAIL: the outputs differ from PyTorch by more than rounding explains\n'
  exit 3
fi
subject="the engines on this device, $TITLE,"
if [[ $BACKEND == onnxrt ]]; then subject="the ONNX files in ONNX Runtime"; fi
printf "PASS: %s compute PyTorch's outputs within their tolerances (%s)\n" "$subject" "$PRECISION"
