# Sourced by gpu-check, gpu-measure and gpu-profile: options, the Python, the time limit, and the verdicts at the end.
# A script sets NAME before, and calls `finish` last. Usage of each: NAME [--dry-run] [FOLDER].
#
# Every step has a limit of its own, all together LIMIT seconds; a step that fails does not stop the others. What is
# printed last fits into 12,000 characters: the ends of the logs that matter, then one line a step. Everything else is in
# FOLDER, and all of it in FOLDER/all.tgz, one file to bring home. No network is used, and nothing is installed.
set -u
cd "$(dirname "$0")/.."
dry=
if [ "${1:-}" = --dry-run ]; then
    dry=1
    shift
fi
folder=${1:-gpu-$NAME-results}
LIMIT=${LIMIT:-570}
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x .venv/bin/python ] && .venv/bin/python -c "import torch" 2>/dev/null; then PYTHON=.venv/bin/python; fi
fi
PYTHONPATH=$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
# The folder must be that of gpu-prebuild: Triton's cache holds absolute paths.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/t2-triton}"
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
began=$(date +%s)
verdicts=
shown=

if [ -n "$dry" ]; then
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
elif [ -f .gpu/triton.tgz ] && [ ! -d "$TRITON_CACHE_DIR" ] && [ "$TRITON_CACHE_DIR" = /tmp/t2-triton ]; then
    tar -xzf .gpu/triton.tgz -C /tmp && echo "kernels of .gpu/triton.tgz: $(find /tmp/t2-triton -name '*.cubin' | wc -l)"
fi

compiled() { find "$TRITON_CACHE_DIR" -name '*.cubin' 2>/dev/null | wc -l; }
there=$(compiled)

step() { # step NAME SECONDS COMMAND...
    name=$1 limit=$2
    shift 2
    left=$((LIMIT - ($(date +%s) - began)))
    if [ "$left" -lt 5 ]; then
        skip "$name" "no time is left of $LIMIT s"
        return
    fi
    if [ "$limit" -gt "$left" ]; then limit=$left; fi
    echo "=== $name"
    start=$(date +%s)
    timeout -k 5 "$limit" "$@" >"$folder/$name.log" 2>&1
    code=$?
    tail -n "${lines:-4}" "$folder/$name.log"
    case $code in
        0) verdict=passed ;;
        124 | 137) verdict="FAILED: not done after $limit s" ;;
        *) verdict="FAILED: exit status $code" ;;
    esac
    verdicts="$verdicts$name: $verdict ($(($(date +%s) - start)) s)
"
}

skip() { verdicts="$verdicts$1: NOT RUN, $2
"; }

show() { # show NAME [PATTERN]: the end of its log, or of its lines with PATTERN, is printed before the verdicts
    if [ -f "$folder/$1.log" ]; then
        grep -e "${2:-.}" "$folder/$1.log" | grep -v -e '^ *[+-]' -e '^┏' -e '^┡' -e '^└' >"$folder/$1.short"
        shown="$shown $1"
    fi
}

# The extension is built here if nothing was brought along: one command, without pip and without a network.
extension() {
    ready='from t2kernels.ops.impls.extension import unsupported; import sys; sys.exit(unsupported(cuda=True))'
    if [ -n "$dry" ]; then
        skip extension "this is a dry run"
    elif "$PYTHON" -c "$ready" 2>/dev/null; then
        step extension 30 "$PYTHON" -c "$ready"
    elif command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then
        step build 150 env T2KERNELS_BUILD_CUDA=1 T2KERNELS_CUDA_ARCHS="${T2KERNELS_CUDA_ARCHS:-$(archs)}" "$PYTHON" setup.py -q build_ext --inplace
        step extension 30 "$PYTHON" -c "$ready"
    else
        skip extension "it was not brought along, and there is no nvcc: the CUDA kernel is left out"
    fi
}

archs() { # of this GPU, as setup.py takes it: only one, so that the build is short
    "$PYTHON" -c "import torch; m, n = torch.cuda.get_device_capability(); print(f'{m}{n}' + 'a' * (m == 9))" 2>/dev/null || echo 90a
}

finish() {
    count=$(echo "$shown" | wc -w)
    for log in $shown; do
        echo "=== $log, the end"
        tail -n 60 "$folder/$log.short" | tail -c $((10000 / count)) | tail -n +2
        rm "$folder/$log.short"
    done
    if [ -z "$dry" ]; then echo "Triton kernels: $there were in the cache, $(($(compiled) - there)) were compiled here"; fi
    printf %s "$verdicts" >"$folder/verdicts.txt"
    (cd "$folder" && tar -czf ../.all.tgz . && mv ../.all.tgz all.tgz)
    echo "=== verdicts of $NAME ($(($(date +%s) - began)) s; logs, rows and all.tgz in $folder)"
    printf %s "$verdicts"
    case $verdicts in *FAILED*) exit 1 ;; esac
    exit 0
}
