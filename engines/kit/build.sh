#!/usr/bin/env bash
# Turns this kit into TensorRT engines, on the device they are for. See README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
HERE=$PWD

usage() {
  cat <<'TEXT'
usage: ./build.sh [options]

Checks this machine, builds the EntropyPrune plugin and compiles one TensorRT engine a component.
It can be stopped and started again: what is finished and unchanged is not built again.

  --check             only check this machine; build nothing
  --component NAME    compile this component only; may repeat
  --plugin FILE       take this libep_entropy_prune.so instead of building it
  --no-plugin         compile the ONNX body of EntropyPrune instead of the plugin (TensorRT 10.7 and later)
  --device N          the GPU to compile on, as nvidia-smi numbers it [0]
  --workspace MIB     limit TensorRT's workspace, where memory is short
  --skip-checksums    do not read every file of the kit first
  --force             go on although version, GPU, memory or disk do not suit
  -h, --help          this text

environment:
  TRTEXEC             path of trtexec, when it is neither on PATH nor in its usual places
  TENSORRT_ROOT       a TensorRT installation: its bin/trtexec and include/ are used
  CUDA_HOME           a CUDA installation: its bin/nvcc is used

exit codes: 0 done, 1 failed, 2 usage
TEXT
}

fail() { # MESSAGE [HINT]
  printf 'error: %s\n' "$1" >&2
  if [[ -n ${2:-} ]]; then printf 'hint: %s\n' "$2" >&2; fi
  exit 1
}
misused() {
  printf 'error: %s\nhint: ./build.sh --help\n' "$1" >&2
  exit 2
}
ok() { printf 'ok     %-9s %s\n' "$1" "$2"; }

# --- options ------------------------------------------------------------------------------------------------
CHECK_ONLY=0 FORCE=0 CHECKSUMS=1 PLUGIN=1 PLUGIN_FILE="" DEVICE=0 WORKSPACE=""
WANTED=()
while (($#)); do
  case $1 in
    --component | --plugin | --device | --workspace)
      if (($# < 2)); then misused "$1 needs a value"; fi ;;&
    --check) CHECK_ONLY=1 ;;
    --component) WANTED+=("$2"); shift ;;
    --plugin) PLUGIN_FILE=$2; shift ;;
    --no-plugin) PLUGIN=0 ;;
    --device) DEVICE=$2; shift ;;
    --workspace) WORKSPACE=$2; shift ;;
    --skip-checksums) CHECKSUMS=0 ;;
    --force) FORCE=1 ;;
    -h | --help) usage; exit 0 ;;
    *) misused "unknown option $1" ;;
  esac
  shift
done
if [[ ! $DEVICE =~ ^[0-9]+$ ]]; then misused "--device is $DEVICE, expected a number"; fi
if [[ -n $WORKSPACE && ! $WORKSPACE =~ ^[0-9]+$ ]]; then misused "--workspace is $WORKSPACE, expected MiB"; fi
if ((!PLUGIN)) && [[ -n $PLUGIN_FILE ]]; then misused "--plugin and --no-plugin exclude each other"; fi

# --- the kit itself: before anything of it is used --------------------------------------------------------------
check_files() {
  local wrong kept=.
  if [[ ! -f SHA256SUMS ]]; then fail "$HERE is no whole kit: SHA256SUMS is missing" "copy the kit again, whole"; fi
  # the scripts and what they read are small: they are checked in any case
  if ((CHECKSUMS)); then printf 'reading every file of the kit ...\n'; else kept='  [^/]*$\|  kit/\|  plugins/'; fi
  if ! wrong=$(grep -e "$kept" SHA256SUMS | LC_ALL=C sha256sum --check --quiet - 2>/dev/null); then
    wrong=$(sed -n '1s/: FAILED.*//p' <<<"$wrong")
    fail "${wrong:-a file} is missing or was changed: its SHA-256 differs from SHA256SUMS" "copy the kit again, whole"
  fi
  ok files "as they were made"
}
check_files
# shellcheck source=/dev/null
source kit/settings.sh
ENGINES=engines/$TARGET
STAMPS=$ENGINES/.stamps
LIBRARY=$ENGINES/libep_entropy_prune.so
read -ra COMPONENTS <<<"$COMPONENT_NAMES"
if ((${#WANTED[@]} == 0)); then WANTED=("${COMPONENTS[@]}"); fi
for name in "${WANTED[@]}"; do
  if [[ " $COMPONENT_NAMES " != *" $name "* ]]; then misused "there is no component $name: $COMPONENT_NAMES"; fi
done
if [[ -z $PLUGIN_COMPONENTS ]]; then PLUGIN=0; fi # no policy of this kit has one
takes_plugin() { ((PLUGIN)) && [[ " $PLUGIN_COMPONENTS " == *" $1 "* ]]; } # NAME

# --- this machine -----------------------------------------------------------------------------------------------
PROBLEMS=0
problem() { # WHAT MESSAGE HINT
  printf 'error: %s\nhint: %s\n' "$2" "$3" >&2
  PROBLEMS=$((PROBLEMS + 1))
}
soft() { # as problem, but --force goes on
  if ((FORCE)); then printf 'forced %-9s %s\n' "$1" "$2"; else problem "$1" "$2" "$3, or --force"; fi
}

compare() { # A B: -1, 0 or 1 for the numbers of A, as many as B has, against those of B
  local -a a b
  local i
  IFS=. read -ra a <<<"$1"
  IFS=. read -ra b <<<"$2"
  for i in "${!b[@]}"; do
    if ((10#${a[i]:-0} < 10#${b[i]})); then echo -1; return; fi
    if ((10#${a[i]:-0} > 10#${b[i]})); then echo 1; return; fi
  done
  echo 0
}

find_trtexec() {
  local candidate
  for candidate in "${TRTEXEC:-}" "${TENSORRT_ROOT:+$TENSORRT_ROOT/bin/trtexec}" \
    "$(command -v trtexec || true)" /usr/src/tensorrt/bin/trtexec /usr/local/tensorrt/bin/trtexec; do
    if [[ -n $candidate && -x $candidate ]]; then echo "$candidate"; return; fi
  done
}

trtexec_version() { # from its banner: [TensorRT v100300] is 10.3.0, [TensorRT v8601] is 8.6.1
  local digits
  digits=$(sed -n 's/.*\[TensorRT v\([0-9][0-9]*\)\].*/\1/p' <<<"$1" | head -n 1)
  if [[ -z $digits ]]; then return; fi
  if ((digits >= 100000)); then
    echo "$((digits / 10000)).$((digits / 100 % 100)).$((digits % 100))"
  else
    echo "$((digits / 1000)).$((digits / 100 % 10)).$((digits % 100))"
  fi
}

check_tensorrt() {
  TRTEXEC=$(find_trtexec)
  if [[ -z $TRTEXEC ]]; then
    problem trtexec "trtexec was not found on PATH, in TENSORRT_ROOT or in /usr/src/tensorrt/bin" \
      "install TensorRT with its samples (on a Jetson: sudo apt install nvidia-jetpack), or set TRTEXEC"
    return
  fi
  HELP=$("$TRTEXEC" --help 2>&1 || true)
  VERSION=$(trtexec_version "$HELP")
  if [[ -z $VERSION ]]; then
    problem trtexec "$TRTEXEC does not say its version" "run it by hand: $TRTEXEC --help"
    return
  fi
  if (($(compare "$VERSION" "$TENSORRT_MIN") < 0 || $(compare "$VERSION" "$TENSORRT_MAX") > 0)); then
    soft TensorRT "TensorRT is $VERSION, this kit is for $TENSORRT ($TITLE)" \
      "make a kit for the target with this version: ep-export targets"
    return
  fi
  if ((PLUGIN)) && ! has --dynamicPlugins; then
    problem TensorRT "TensorRT $VERSION cannot load the plugin: its trtexec has no --dynamicPlugins" \
      "use TensorRT 10 or later"
    return
  fi
  ok TensorRT "$VERSION, $TRTEXEC"
}
has() { grep -q -e "$1" <<<"$HELP"; }

gpu_sm() { # three ways to ask; none of them on every machine
  local sm
  sm=$(nvidia-smi -i "$DEVICE" --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d ' ' || true)
  if [[ $sm =~ ^[0-9]+\.[0-9]+$ ]]; then echo "$sm"; return; fi
  case $(tr '\0' ' ' 2>/dev/null <"$PROC/device-tree/compatible" || true) in # a Jetson's own name of its chip
    *tegra194*) echo 7.2; return ;;
    *tegra234*) echo 8.7; return ;;
    *tegra264*) echo 11.0; return ;;
  esac
  python3 - "$DEVICE" 2>/dev/null <<'PYTHON' || true
import ctypes, sys

cuda = ctypes.CDLL("libcuda.so.1")
device, value = ctypes.c_int(), ctypes.c_int()
assert cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), int(sys.argv[1])) == 0
numbers = []
for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    assert cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) == 0
    numbers.append(str(value.value))
print(".".join(numbers))
PYTHON
}

check_gpu() {
  local machine
  machine=$(uname -m)
  if [[ $machine != "$PLATFORM" ]]; then
    soft machine "this machine is $machine, this kit is for $PLATFORM ($TITLE)" "run it on the device"
  fi
  FOUND_SM=$(gpu_sm)
  if [[ -z $FOUND_SM ]]; then
    soft GPU "no GPU was found: nvidia-smi, the device tree and libcuda.so.1 say nothing" \
      "run it on the device, with its driver installed"
    FOUND_SM=$SM
  elif [[ $FOUND_SM != "$SM" ]]; then
    soft GPU "this GPU is SM $FOUND_SM, this kit is for SM $SM ($TITLE)" "make a kit for this GPU: ep-export targets"
  else
    ok GPU "SM $FOUND_SM"
  fi
}

check_space() {
  local memory free disk
  memory=$(awk '/^MemAvailable:/ {print int($2 / 1024)}' "$PROC/meminfo")
  if ((memory < NEED_MEMORY_MIB)); then
    soft memory "$memory MiB of memory are free, building needs about $NEED_MEMORY_MIB MiB (an estimate)" \
      "close other programs, add swap (sudo fallocate, mkswap, swapon)"
  else
    ok memory "$memory MiB free, about $NEED_MEMORY_MIB needed (an estimate)"
  fi
  # a Jetson answers [N/A] here: its GPU has the same memory
  free=$(nvidia-smi -i "$DEVICE" --query-gpu=memory.free --format=csv,noheader,nounits 2>/dev/null | head -n 1 | tr -d ' ' || true)
  if [[ $free =~ ^[0-9]+$ ]] && ((free < NEED_MEMORY_MIB)); then
    soft memory "$free MiB of GPU memory are free, building needs about $NEED_MEMORY_MIB MiB (an estimate)" \
      "end other programs on the GPU (nvidia-smi lists them)"
  fi
  disk=$(df -Pk . | awk 'NR == 2 {print int($4 / 1024)}')
  if ((disk < NEED_DISK_MIB)); then
    soft disk "$disk MiB of disk are free in $HERE, the engines need about $NEED_DISK_MIB MiB (an estimate)" \
      "move the kit to a larger disk"
  else
    ok disk "$disk MiB free, about $NEED_DISK_MIB needed (an estimate)"
  fi
}

find_nvcc() {
  local candidate
  for candidate in "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc; do
    if [[ -n $candidate && -x $candidate ]]; then echo "$candidate"; return; fi
  done
}

check_tools() {
  if ! command -v python3 >/dev/null; then
    problem python3 "python3 was not found; it writes $ENGINES/engine.json" "sudo apt install python3"
  fi
  if ((!PLUGIN)); then
    if [[ -z $PLUGIN_COMPONENTS ]]; then
      ok plugin "not needed"
    elif ((STRIPPED)); then
      problem plugin "--no-plugin needs TensorRT 10.7 or later: below that a body wins over the plugin, so this kit has none" \
        "leave --no-plugin out"
    elif ((!BODY_FITS)); then
      problem plugin "--no-plugin cannot keep so many tokens: TensorRT's TopK ends below 3840" \
        "make the kit with a smaller --max-kept-tokens, or leave --no-plugin out"
    fi
    return
  fi
  if [[ -n $PLUGIN_FILE ]]; then
    if [[ ! -f $PLUGIN_FILE ]]; then problem plugin "$PLUGIN_FILE is no file" "give the plugin's library"; fi
    return
  fi
  NVCC=$(find_nvcc)
  if [[ -z $NVCC ]]; then
    problem nvcc "nvcc was not found in CUDA_HOME, on PATH or in /usr/local/cuda/bin" \
      "install the CUDA toolkit (on a Jetson: sudo apt install nvidia-jetpack), or give --plugin FILE"
  fi
  for tool in cmake c++; do
    if ! command -v "$tool" >/dev/null; then
      problem "$tool" "$tool was not found; it builds the plugin" "sudo apt install cmake g++, or give --plugin FILE"
    fi
  done
  if ((PROBLEMS == 0)); then ok plugin "to be built with $NVCC"; fi
}

PROC=${PROC:-/proc} # where the kernel tells about the machine; tests set it
HELP="" VERSION="" FOUND_SM="" NVCC=""
check_tensorrt
check_gpu
check_space
check_tools
if ((PROBLEMS)); then exit 1; fi
if ((CHECK_ONLY)); then exit 0; fi

# --- building ---------------------------------------------------------------------------------------------------
mkdir -p "$STAMPS" logs
rm -f "$ENGINES"/*.part
RUNNING=""
# Called by the trap alone.
# shellcheck disable=SC2317,SC2329
interrupted() {
  trap - INT TERM
  if [[ -n $RUNNING ]]; then kill "$RUNNING" 2>/dev/null || true; fi
  rm -f "$ENGINES"/*.part
  printf 'error: interrupted; what is finished is kept\nhint: run ./build.sh again to go on\n' >&2
  exit 130
}
trap interrupted INT TERM

logged() { # LOG COMMAND...: runs it in the background, so that an interrupt is heard at once
  local log=$1 status=0
  shift
  "$@" >"$log" 2>&1 &
  RUNNING=$!
  wait "$RUNNING" || status=$?
  RUNNING=""
  return "$status"
}

advice() { # LOG: what its errors usually mean
  if grep -qiE 'out of memory|OutOfMemory|Cuda failure: 2\b|std::bad_alloc' "$1"; then
    echo "memory ran out: close other programs, add swap, or give --workspace 1024"
  elif grep -qiE 'plugin not found|could not find plugin|No importer registered' "$1"; then
    echo "the EntropyPrune plugin was not taken: build it on this device (rm -r build) and do not use another GPU's"
  elif grep -qiE 'No space left' "$1"; then
    echo "the disk is full: move the kit to a larger one"
  else
    echo "read $1; ./build.sh goes on after the components that are finished"
  fi
}

stamp_of() { sed -n "s/^$2 //p" "$1" 2>/dev/null | head -n 1 || true; }
checksum() { sha256sum "$1" | cut -d ' ' -f 1; }

build_plugin() {
  local inputs
  if [[ -n $PLUGIN_FILE ]]; then
    cp "$PLUGIN_FILE" "$LIBRARY.part"
    mv "$LIBRARY.part" "$LIBRARY"
    ok plugin "$PLUGIN_FILE"
    return
  fi
  inputs=$({ grep '  plugins/' SHA256SUMS; echo "$FOUND_SM $VERSION"; "$NVCC" --version 2>/dev/null | tail -n 2; } |
    sha256sum | cut -d ' ' -f 1)
  if [[ -f $LIBRARY && $(stamp_of "$STAMPS/plugin" inputs) == "$inputs" &&
    $(stamp_of "$STAMPS/plugin" output) == "$(checksum "$LIBRARY")" ]]; then
    ok plugin "built already"
    return
  fi
  printf 'building the plugin (logs/plugin.log) ...\n'
  local -a configure=(cmake -S plugins -B build/plugin "-DNVCC=$NVCC" "-DEP_CUDA_ARCHITECTURES=${FOUND_SM/./}"
    -DEP_PLUGIN_TESTS=OFF)
  if [[ -n ${TENSORRT_ROOT:-} ]]; then configure+=("-DTENSORRT_ROOT=$TENSORRT_ROOT"); fi
  if ! logged logs/plugin.log "${configure[@]}" ||
    ! logged logs/plugin-make.log cmake --build build/plugin -j "$(nproc)"; then
    tail -n 15 logs/plugin.log >&2
    if [[ -f logs/plugin-make.log ]]; then tail -n 15 logs/plugin-make.log >&2; fi
    fail "the plugin could not be built" "its last lines are above, all of them in logs/plugin*.log"
  fi
  cp build/plugin/libep_entropy_prune.so "$LIBRARY.part"
  mv "$LIBRARY.part" "$LIBRARY"
  printf 'inputs %s\noutput %s\n' "$inputs" "$(checksum "$LIBRARY")" >"$STAMPS/plugin"
  ok plugin "$LIBRARY"
}

# Options that not every version has are asked for by name in its own help text.
common_options() {
  # 8.x and 10.x type a network by builder flags unless told that the ONNX file's own types hold; 11 always does
  if (($(compare "$VERSION" 11) < 0)) && has --stronglyTyped; then echo --stronglyTyped; fi
  # TF32 has 10 bits of mantissa: too coarse to rank tokens by, and not what float32 graphs were compared in
  if has --noTF32; then echo --noTF32; fi
  if has --skipInference; then echo --skipInference; else echo --buildOnly; fi
  if has --timingCacheFile; then echo "--timingCacheFile=$ENGINES/timing.cache"; fi
  if [[ -n $WORKSPACE ]]; then echo "--memPoolSize=workspace:$WORKSPACE"; fi
  if ((DEVICE)); then echo "--device=$DEVICE"; fi
}

build_component() { # NAME
  local name=$1 onnx=$1.onnx engine=$ENGINES/$1.engine log=logs/$1.log inputs start status=0
  local -a options=() shapes
  mapfile -t options < <(common_options)
  mapfile -t shapes <"kit/$name.args"
  if takes_plugin "$name"; then
    # --staticPlugins only opens the library, which suits plugins that register themselves; ours is registered by
    # TensorRT, through the library's getCreators, so that one binary serves TensorRT 10.3 to 11
    options+=("--dynamicPlugins=$LIBRARY")
    if ((STRIPPED)); then onnx=$name.plugin.onnx; fi
  fi
  # TensorRT needs to know how many rows caches hold, which the graphs themselves leave open
  if [[ -f $name.settled.onnx ]]; then onnx=$name.settled.onnx; fi
  inputs=$({
    grep -e "  $onnx\$" -e '  weights/' SHA256SUMS
    printf '%s\n' "${shapes[@]}" "${options[@]}" "$VERSION $FOUND_SM"
    if takes_plugin "$name"; then checksum "$LIBRARY"; fi
  } | sha256sum | cut -d ' ' -f 1)
  if [[ -f $engine && $(stamp_of "$STAMPS/$name" inputs) == "$inputs" &&
    $(stamp_of "$STAMPS/$name" output) == "$(checksum "$engine")" ]]; then
    ok "$name" "built already"
    return
  fi
  printf 'compiling %s (%s) ...\n' "$name" "$log"
  rm -f "$STAMPS/$name" "$ENGINES/engine.json"
  start=$SECONDS
  logged "$log" "$TRTEXEC" "--onnx=$onnx" "--saveEngine=$engine.part" "${shapes[@]}" "${options[@]}" || status=$?
  # older versions end with 0 after a failed build: the engine itself is the proof
  if ((status)) || [[ ! -s $engine.part ]]; then
    rm -f "$engine.part"
    grep -E '\[E\]|[Ee]rror' "$log" | tail -n 8 >&2 || true
    fail "trtexec could not compile $name (exit $status)" "$(advice "$log")"
  fi
  mv "$engine.part" "$engine"
  printf 'inputs %s\noutput %s\nseconds %s\n' "$inputs" "$(checksum "$engine")" "$((SECONDS - start))" >"$STAMPS/$name"
  ok "$name" "$(($(stat -c %s "$engine") / 1048576)) MiB in $((SECONDS - start)) s"
}

if ((PLUGIN)); then build_plugin; fi
for name in "${WANTED[@]}"; do build_component "$name"; done
for name in "${COMPONENTS[@]}"; do
  if [[ ! -f $STAMPS/$name ]]; then
    printf 'not all components are compiled yet: %s is missing\n' "$name"
    exit 0
  fi
done
if ((!PLUGIN)); then rm -f "$LIBRARY"; fi
python3 kit/write_record.py "$ENGINES" "$VERSION" "$FOUND_SM" "$PLUGIN"
printf 'done: %s\nnext: ./verify.sh\n' "$HERE/$ENGINES"
