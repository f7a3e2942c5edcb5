#!/usr/bin/env bash
# Builds both engines of this package with trtexec (TensorRT-RTX: tensorrt_rtx), on this device.
#     ./build.sh [--plugin LIBRARY] [FLAG...]      other flags go to the tool as they are
# build.conf beside it holds what is this package's own: tool, release, flags of each graph.
set -euo pipefail

fail() {
    echo "build.sh: $2" >&2
    exit "$1"
}

# The graph without the plugin's function, beside links to the weights: releases before 10.15 take a
# plugin only where there is no function, and look for weights beside the graph.
bare() {
    mkdir -p engines/without_body
    cp "plugin/$1.onnx" "engines/without_body/$1.onnx"
    for name in "${WEIGHTS[@]}"; do ln -sfn "../../bundle/$name" "engines/without_body/$name"; done
    echo "engines/without_body/$1.onnx"
}

cd "$(dirname "${BASH_SOURCE[0]}")"
[ -f build.conf ] || fail 5 "build.conf is not there: copy the package again"
. ./build.conf

plugin=()
if [ "${1:-}" = "--plugin" ]; then
    [ "$#" -ge 2 ] || fail 2 "--plugin needs a library"
    [ "$HAS_PLUGIN" = yes ] || fail 6 "these graphs call no plugin"
    [ -f "$2" ] || fail 2 "there is no library $2"
    plugin=("--staticPlugins=$2" "${PLUGIN_FLAGS[@]}")
    shift 2
fi

tool=$(command -v "$TOOL" || true)
for folder in /usr/src/tensorrt/bin /opt/tensorrt/bin; do
    if [ -z "$tool" ] && [ -x "$folder/$TOOL" ]; then tool="$folder/$TOOL"; fi
done
[ -n "$tool" ] || fail 7 "no TensorRT found: $TOOL is neither on PATH nor in /usr/src/tensorrt/bin"

mkdir -p engines
for graph in prefill decode; do
    if [ "$graph" = prefill ]; then flags=("${PREFILL_FLAGS[@]}"); else flags=("${DECODE_FLAGS[@]}"); fi
    started=$SECONDS
    onnx="bundle/$graph.onnx"
    if [ "${#plugin[@]}" -gt 0 ] && [ -f "plugin/$graph.onnx" ]; then onnx=$(bare "$graph"); fi
    "$tool" "--onnx=$onnx" "--saveEngine=engines/$graph.partial" \
        "${COMMON_FLAGS[@]}" "${flags[@]}" ${plugin[@]+"${plugin[@]}"} "$@" \
        >"engines/$graph.log" 2>&1 || fail 6 "$graph was not built: see engines/$graph.log"
    [ -s "engines/$graph.partial" ] || fail 6 "$graph was not built: see engines/$graph.log"
    mv "engines/$graph.partial" "engines/$graph.plan"
    echo "$graph.plan: $(wc -c <"engines/$graph.plan") bytes in $((SECONDS - started)) s"
done
if [ "${#plugin[@]}" -gt 0 ]; then with=true; else with=false; fi
printf '{"by": "build.sh", "tool": "%s", "release": "%s", "plugin": %s}\n' "$TOOL" "$RELEASE" "$with" \
    >engines/build.json
