#!/usr/bin/env bash
# Make .venv with mtrec in it, from pinned versions that match one another.
#
#   deploy/install.sh [cpu|cuda] [--dev]
#
# Without cpu or cuda it keeps what .venv holds already, else takes cuda where nvidia-smi shows a GPU and cpu elsewhere.
# --dev adds what the tests need. A second run sees that nothing changed and ends at once.
# PYTHON=/path/to/python picks the interpreter; otherwise python3.11 is taken first, then 3.12 to 3.14.
set -euo pipefail

readonly PYTORCH_INDEX=https://download.pytorch.org/whl/cpu
readonly OLDEST_DRIVER=580 # the first for CUDA 13.0
readonly PYTHONS=(python3.11 python3.12 python3.13 python3.14 python3)

fail() {
    printf '\ninstall.sh: %s\n' "$1" >&2
    exit 1
}

parse_arguments() {
    device='' dev=''
    for argument in "$@"; do
        case "$argument" in
            cpu | cuda) device=$argument ;;
            --dev) dev=yes ;;
            -h | --help)
                sed -n '2,9s/^# \{0,1\}//p' "$0"
                exit 0
                ;;
            *) fail "'$argument' should be cpu, cuda or --dev." ;;
        esac
    done
}

# Prints the NVIDIA driver's version, or nothing where no driver answers.
driver_version() {
    command -v nvidia-smi >/dev/null || return 0
    nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | grep -m 1 '^[0-9]' || true
}

# What .venv was made for, else what this machine has.
choose_device() {
    [ -z "$device" ] || return 0
    local driver
    driver=$(driver_version)
    if [ -f .venv/installed-for ]; then
        device=$(cat .venv/installed-for)
    elif [ -z "$driver" ]; then
        device=cpu
    elif [ "${driver%%.*}" -ge "$OLDEST_DRIVER" ]; then
        device=cuda
    else
        device=cpu
        echo "install.sh: there is a GPU, but its driver $driver is older than $OLDEST_DRIVER (CUDA 13.0): taking the CPU build."
    fi
}

# Changes with whatever decides the content of .venv: this script, the pins, pyproject.toml, and the place of .venv,
# because the commands in it carry its absolute path.
fingerprint() {
    { cat deploy/install.sh "deploy/constraints-$device.txt" pyproject.toml && pwd; } | cksum
}

is_installed() {
    [ -x .venv/bin/mtrec ] && [ "$(cat ".venv/installed-$1" 2>/dev/null)" = "$(fingerprint)" ]
}

# Sets `python` to the first interpreter that is new enough and can make an environment.
find_python() {
    local name candidate problem without_venv='' found=''
    for name in ${PYTHON:+"$PYTHON"} "${PYTHONS[@]}"; do
        while read -r candidate; do
            case "$candidate" in "$PWD"/.venv/*) continue ;; *) ;; esac # an activated .venv, which may be made anew
            # Says nothing where the interpreter is right; "venv" where only its venv module is missing.
            problem=$("$candidate" - 2>/dev/null <<'END'
import importlib.util, sys, sysconfig
if not (3, 11) <= sys.version_info[:2] <= (3, 14) or sys.maxsize < 2**32 or sysconfig.get_config_var("Py_GIL_DISABLED"):
    print("version", sys.version.split()[0])
elif importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
    print("venv", "python%d.%d-venv" % sys.version_info[:2])
END
            ) || continue # a launcher without an interpreter behind it
            case "$problem" in
                '') python=$candidate && return 0 ;;
                venv*) without_venv=${without_venv:-${problem#venv }} ;;
                *) found="$found $candidate (${problem#version })" ;;
            esac
        done < <(type -ap "$name")
        [ -z "${PYTHON:-}" ] || break
    done
    [ -z "$without_venv" ] ||
        fail "Python is here, but not its venv module. On Debian or Ubuntu: apt install $without_venv"
    fail "Python 3.11 to 3.14 (64 bit) is needed. Found:${found:- none}. On Debian or Ubuntu: apt install python3 python3-venv"
}

# torch and fbgemm-gpu publish their packages for Linux with glibc 2.28 or newer.
check_machine() {
    [ "$(uname -s)" = Linux ] || fail "fbgemm-gpu is published for Linux only. Found: $(uname -s)."
    local machine glibc
    machine=$(uname -m)
    glibc=$("$python" -c 'import platform; print(*platform.libc_ver())')
    case "$device-$machine" in
        cpu-x86_64 | cpu-aarch64 | cuda-x86_64) ;;
        *) fail "fbgemm-gpu for $device is not published for $machine." ;;
    esac
    case "$glibc" in
        'glibc 2.'*) [ "${glibc#glibc 2.}" -ge 28 ] || fail "glibc 2.28 or newer is needed. Found: $glibc." ;;
        *) fail "glibc 2.28 or newer is needed (musl, as in Alpine, does not do). Found: ${glibc:-another C library}." ;;
    esac
    [ "$device" = cpu ] || check_driver
}

# The packages of constraints-cuda.txt are built for CUDA 13.0. No driver is fine: a container image is built without.
check_driver() {
    local driver
    driver=$(driver_version)
    if [ -z "$driver" ]; then
        echo "install.sh: no NVIDIA driver answers here; mtrec will need one to run."
    elif [ "${driver%%.*}" -lt "$OLDEST_DRIVER" ]; then
        fail "CUDA 13.0 needs NVIDIA driver $OLDEST_DRIVER or newer. Found: $driver. Update it, or run: deploy/install.sh cpu"
    fi
}

# An environment that was moved is made anew: the commands in it name the interpreter by its absolute path.
make_environment() {
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1 || ! grep -qF "$PWD/.venv/bin/python" .venv/bin/pip ||
        { [ -f .venv/installed-for ] && [ "$(cat .venv/installed-for)" != "$device" ]; }; then
        echo "install.sh: new .venv for $device with $("$python" --version)"
        "$python" -m venv --clear .venv || fail "$python -m venv failed; its message stands above."
    fi
    rm -f .venv/installed-cpu* .venv/installed-cuda*
    echo "$device" >.venv/installed-for
}

# Without pip's compiling, module after module, which takes as long as all else: see compile_packages.
pip_install() {
    .venv/bin/python -m pip install --no-compile --progress-bar off --disable-pip-version-check \
        -c "deploy/constraints-$device.txt" "$@" >>.venv/pip.log 2>&1
}

fail_at_pip() {
    tail -n 20 .venv/pip.log >&2
    fail "$1
Above is the end of .venv/pip.log. Run this again when the reason is gone."
}

pinned() {
    grep -i "^$1==" "deploy/constraints-$device.txt"
}

# The exact pin "+cpu" keeps pip from the CUDA build and its gigabytes. PyPI has no "+cpu" builds: the wheel comes from
# where pip already looks (PIP_FIND_LINKS, a mirror), else from PyTorch's own index. The second way could not be tried
# where this was written. PyTorch's index is asked for torch alone, so that nothing else can come from it.
install_cpu_torch() {
    local pin
    pin=$(pinned torch)
    pip_install --no-deps "$pin" || pip_install --no-deps --index-url "$PYTORCH_INDEX" "$pin" ||
        fail_at_pip "$pin was found neither where pip looks (PIP_INDEX_URL, PIP_FIND_LINKS) nor at $PYTORCH_INDEX.
Without that index, put the wheel for $(.venv/bin/python --version) into a folder and set PIP_FIND_LINKS to the folder."
}

install_packages() {
    echo "install.sh: installing mtrec for $device${dev:+ with the packages of the tests}; some two minutes (.venv/pip.log)"
    : >.venv/pip.log
    pip_install "$(pinned setuptools)" || fail_at_pip 'pip could not install its first package. Is a package index within reach?'
    [ "$device" = cuda ] || install_cpu_torch
    local failure='pip could not install the packages.'
    # The setuptools of above builds mtrec too: no second download into a build environment.
    local wanted=(--no-build-isolation --editable ".${dev:+[dev]}")
    if [ "$device" = cuda ]; then
        pip_install torchrec fbgemm-gpu "${wanted[@]}" || fail_at_pip "$failure"
    else
        pip_install fbgemm-gpu-cpu "${wanted[@]}" || fail_at_pip "$failure"
        # Last and alone: it asks for the CUDA build of fbgemm-gpu.
        pip_install --no-deps torchrec || fail_at_pip "$failure"
    fi
}

# On all cores. Left to the first import, it would be done at every start by who may not write into .venv (a container image, a
# machine that others share) or does not (PYTHONDONTWRITEBYTECODE).
compile_packages() {
    echo "install.sh: compiling the packages on all cores"
    # It fails at what is no Python of this version (a test of torch's is for 3.12), which nobody imports.
    .venv/bin/python -m compileall -qq -j 0 mtrec .venv/lib/python*/site-packages || true
}

check_installation() {
    .venv/bin/python -c 'from mtrec.versions import check_versions; check_versions(driver_needed=False)' ||
        fail "the packages do not match one another. Remove .venv and run this again."
    # The CUDA build of fbgemm-gpu cannot be loaded without a driver, which may come later (a container image).
    [ "$device" = cuda ] || .venv/bin/python -W ignore -c 'import torchrec' ||
        fail "torchrec cannot be imported; the reason stands above. Remove .venv and run this again."
}

main() {
    parse_arguments "$@"
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    choose_device
    if is_installed "$device-dev" || { [ -z "$dev" ] && is_installed "$device"; }; then
        return 0
    fi
    find_python
    check_machine
    make_environment
    install_packages
    compile_packages
    check_installation
    [ -z "$dev" ] || fingerprint >".venv/installed-$device-dev"
    fingerprint >".venv/installed-$device"
    echo "install.sh: done. The command is .venv/bin/mtrec"
}

main "$@"
