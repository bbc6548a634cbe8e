# shellcheck shell=bash disable=SC2034,SC2154
# Startup script of a TPU host, as root at every boot; launch/tpu/cloud.py puts the values in front of
# it (NAME LOGS KIND SOURCE REVISION SETUP BACKEND HOSTS LIMIT PROGRAM DELETE). What it prints goes to
# the serial console, to /opt/compat_jax/run.log and, once a minute, to $LOGS/worker-N.log.
set -uo pipefail
export HOME="${HOME:-/root}" PYTHONUNBUFFERED=1
ROOT="${COMPAT_JAX_ROOT:-/opt/compat_jax}"
PYTHON="$ROOT/venv/bin/python"
LOG="$ROOT/run.log"
export PATH="$PATH:/snap/bin:$ROOT/bin" UV_PYTHON_INSTALL_DIR="$ROOT/python"
export TFDS_DATA_DIR="$ROOT/data"
mkdir -p "$TFDS_DATA_DIR"
rm -f "$ROOT/time-is-over" "$ROOT/pid"
trap 'kill $(jobs -p) 2>/dev/null' EXIT

attribute() {  # a value of the VM's metadata, nothing if there is none
  curl -sf -H 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

several() {  # whether the slice has several hosts; some sizes only the VM knows
  [ "$HOSTS" -gt 1 ] || case "$(attribute worker-network-endpoints)" in *,*) ;; *) false ;; esac
}

number() {  # of this host in the slice, nothing if it cannot be known
  for attempt in 1 2 3 4 5; do
    attribute agent-worker-number && return
    several || return
    sleep 5
  done
  [ "$BACKEND" = tpu_api ] && hostname -s | sed -n 's/.*-w-\([0-9][0-9]*\)$/\1/p'
}

store_log() { gcloud storage cp --quiet "$LOG" "$LOGS/worker-$WORKER.log" >/dev/null 2>&1; }

install() {  # the images have Python 3.10: uv brings its own
  rm -rf "$ROOT/source" "$ROOT/venv"
  command -v uv >/dev/null ||
    curl -LsSf https://astral.sh/uv/install.sh | UV_INSTALL_DIR="$ROOT/bin" sh || return 1
  PACKAGE="$ROOT/source"
  case "$KIND" in
    archive)
      mkdir "$ROOT/source" && gcloud storage cp --quiet "$SOURCE" "$ROOT/source.tar.gz" &&
        tar -xzf "$ROOT/source.tar.gz" -C "$ROOT/source" ;;
    repo)
      command -v git >/dev/null || { apt-get update && apt-get install -y git; }
      git clone --depth=1 ${REVISION:+--branch "$REVISION"} -- "$SOURCE" "$ROOT/source" ;;
    wheel)
      PACKAGE="$ROOT/${SOURCE##*/}" && gcloud storage cp --quiet "$SOURCE" "$PACKAGE" ;;
  esac || return 1
  uv venv --python 3.12 "$ROOT/venv" && uv pip install --python "$PYTHON" "${PACKAGE}[tpu]" &&
    (cd "$ROOT" && PATH="$ROOT/venv/bin:$PATH" bash -c "$SETUP")
}

finish() {  # stores the exit code for `up` to read, then gives the slice back
  echo "=== $NAME: the run ends with code $1"
  store_log
  if [ "$WORKER" = 0 ]; then
    echo "$1" > "$ROOT/exit"
    for attempt in 1 2 3 4 5 6; do  # without it, `up` takes the slice for lost and rents another
      gcloud storage cp --quiet "$ROOT/exit" "$LOGS/exit" && break
      echo "=== $NAME: storing the exit code, attempt $attempt of 6 failed"
      sleep 20
    done
    sleep 60  # time for the other hosts to store their logs
    # If that is refused (no permission): a stopped VM of Compute Engine costs no TPU time.
    "${DELETE[@]}" || { [ "$BACKEND" = gce ] && shutdown -h now; }
  fi
  exit "$1"
}

command -v gcloud >/dev/null || snap install google-cloud-cli --classic
WORKER="$(number)"
UNNUMBERED=""
[ -n "$WORKER" ] || { WORKER=0; several && UNNUMBERED=yes; }
# A recreated host continues the log of its predecessor.
[ -e "$LOG" ] || gcloud storage cp --quiet "$LOGS/worker-$WORKER.log" "$LOG" >/dev/null 2>&1
exec > >(tee -a "$LOG") 2>&1
echo "=== $NAME: $(date -u +%FT%TZ) worker $WORKER boots as $(hostname)"
while sleep 60; do store_log; done >/dev/null 2>&1 &
# Shortly before the slice's time is over, SIGTERM makes the program save and stop.
( sleep "$LIMIT" && touch "$ROOT/time-is-over" && kill -TERM "$(cat "$ROOT/pid")" &&
  sleep 240 && kill -KILL "$(cat "$ROOT/pid")" ) >/dev/null 2>&1 &

if [ -n "$UNNUMBERED" ]; then  # every host would act as the first, and JAX could not join them
  echo "=== $NAME: one of several hosts, and the VM has no agent-worker-number to say which"
  finish 1
fi

for attempt in 1 2 3 4 5; do
  [ -e "$ROOT/installed" ] && break
  install && touch "$ROOT/installed" && break
  echo "=== $NAME: install $attempt of 5 failed"
  sleep 30
done
[ -e "$ROOT/installed" ] || finish 1

cd "$ROOT"
[ "$KIND" = wheel ] || cd source
if [ "$KIND" = wheel ]; then  # where launch is installed, so that configs/... is found
  cd "$("$PYTHON" -c 'import launch, os; print(os.path.dirname(os.path.dirname(launch.__file__)))')"
fi
case " ${PROGRAM[*]} " in *' --multihost '*) ;; *)
  several && PROGRAM+=(--multihost) ;;
esac

failures=0
while :; do
  [ -e "$ROOT/time-is-over" ] && finish 75
  began=$SECONDS
  "$PYTHON" "${PROGRAM[@]}" &
  echo $! > "$ROOT/pid"
  wait $!
  code=$?
  echo "=== $NAME: $(date -u +%FT%TZ) the program left with code $code"
  # The VM itself goes down: the slice that is created next resumes.
  [ "$(systemctl is-system-running 2>/dev/null)" = stopping ] && exit 0
  case "$code" in
    0 | 2) finish "$code" ;;  # ended well, or a mistake in the command, which no retry can fix
    75) sleep 5 ;;  # "resume me"
    *)
      # Failures of a long life, such as lost hosts, do not add up.
      [ $((SECONDS - began)) -gt 1200 ] && failures=0
      failures=$((failures + 1))
      # One host decides: the others keep trying until the slice is given back.
      [ "$failures" -ge 3 ] && [ "$WORKER" = 0 ] && finish "$code"
      sleep 30 ;;
  esac
done
