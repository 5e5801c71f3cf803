# shellcheck shell=bash
# What every launcher here gives to all processes of a run; sourced by them, harmless to source twice.
# Each line has its reason beside it. What belongs to one cluster (its adapters, its proxies) is set in the environment
# or in the file that JAXTRON_SITE names, which is sourced last and wins.

# NCCL says which call of which library failed, where JAX alone says "unhandled system error"
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# a log that is a file shows each line when it is printed: the last lines before a kill are those one wants
export PYTHONUNBUFFERED=1
# launchers such as mpirun make terminals of files, into which progress bars would draw
export TERM=dumb
# JAX's processes speak to the coordinator by gRPC, which may take a proxy of the environment even for this machine; where
# there is none JAX would only warn of the variable
if [ -n "${http_proxy:-}${https_proxy:-}${HTTP_PROXY:-}${HTTPS_PROXY:-}" ]; then
  case ",${no_proxy:-}," in
    *,127.0.0.1,*) ;;
    *) export no_proxy="127.0.0.1,localhost${no_proxy:+,$no_proxy}" ;;
  esac
fi
# InfiniBand locks the memory that it sends from; where the limit cannot be raised, the doctor says what follows
ulimit -l unlimited 2> /dev/null || true
# checkpoints and data keep many files open; as many as the hard limit allows
ulimit -n "$(ulimit -H -n)" 2> /dev/null || true
# a process with a GPU's memory mapped leaves a core file as large as a disk
ulimit -c 0

# Left alone, for NCCL and XLA choose well by themselves (docs/runs.md, "Flags and environment on GPUs"):
#   NCCL_SOCKET_IFNAME, NCCL_IB_HCA   where the doctor finds the wrong network: in the file of JAXTRON_SITE
#   NCCL_ALGO, NCCL_PROTO, NCCL_NVLS_ENABLE, XLA_FLAGS   runtime.xla_preset and runtime.xla_flags have XLA's
if [ -n "${JAXTRON_SITE:-}" ]; then
  # shellcheck disable=SC1090
  . "$JAXTRON_SITE" || exit 2
fi

# Python: PYTHON, else the checkout's own environment, else what is on the PATH
if [ -z "${PYTHON:-}" ]; then
  if [ -x "$PWD/.venv/bin/python" ] && [ -z "${IMAGE:-}" ]; then PYTHON=$PWD/.venv/bin/python; else PYTHON=python; fi
fi

# names of the variables that processes on other machines need too, where the launcher does not pass all on
passed_on() {
  compgen -e | grep -E '^(NCCL|XLA|JAX|CUDA|UCX|FI|JAXTRON)_|^(PATH|PYTHONPATH|PYTHONUNBUFFERED|VIRTUAL_ENV|TERM|no_proxy|LD_LIBRARY_PATH|HF_HOME|XDG_CACHE_HOME)$' |
    grep -v '^CUDA_VISIBLE_DEVICES$'
}

# What an exit code of training asks for (docs/clusters.md): go on, try again, or leave it.
#   saved  stopped by a signal: with a checkpoint (130), or before there was anything to save (143, 138)
#   lost   a process or its machine is gone (75, 137), or it crashed (134, 139): worth another try, not any number of them
#   over   done, or an error that would come again
meaning_of() {
  case $1 in
    130 | 138 | 143) echo saved ;;
    75 | 134 | 137 | 139) echo lost ;;
    *) echo over ;;
  esac
}
