#!/usr/bin/env bash
# dist/orchestrator.py as a newcomer has it: alone in an empty folder, its database made there, one task run to its end by a handlers.py.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
place=$(mktemp -d /tmp/orchestrator-alone-XXXXXX)
chmod 755 "$place"   # PostgreSQL doesn't run as root
worker=
trap 'status=$?; [ -z "$worker" ] || kill -9 $worker 2>/dev/null || true; rm -rf "$place"; exit $status' EXIT
cp dist/orchestrator.py "$place"
cd "$place"
export METRICS_PORT=0
cat >handlers.py <<'PYTHON'
def hello(task):
    return {"hello": task.payload["name"]}

HANDLERS = {"task:hello": hello}
PYTHON

"$python" orchestrator.py --version
"$python" orchestrator.py install
id=$("$python" orchestrator.py enqueue task:hello '{"name": "Ada"}')
"$python" orchestrator.py >worker.log 2>&1 &
worker=$!
for _ in $(seq 60); do
    shown=$("$python" orchestrator.py show "$id")
    ! grep -q '"hello": "Ada"' <<<"$shown" || break
    sleep 0.5
done
grep -q '"hello": "Ada"' <<<"$shown" || { echo "$shown"; cat worker.log; exit 1; }
kill -TERM $worker
wait $worker || { cat worker.log; exit 1; }
worker=
"$python" orchestrator.py audit
echo "the bundle alone in an empty folder: installed, enqueued, ran, stopped"
