#!/usr/bin/env bash
# Builds the image and runs it, alone and by both compose profiles, and checks what is promised of them. Prints a line for each
# check with the seconds since the start; ends at the first that fails. Needs Docker with compose 2.24 or newer, curl, and the ports
# of docker-compose.yml on 127.0.0.1. Where no registry of images can be reached, run stand-ins.sh before; Prometheus and Grafana
# are left out where their images are not there. Takes away what it started, its volumes too; uses names of its own.
set -euo pipefail
cd "$(dirname "$0")/../.."
export COMPOSE_PROJECT_NAME=orchestrator-verify POSTGRES_PASSWORD=verify-$RANDOM
single=orchestrator-verify-single scratch=$(mktemp -d /tmp/verify-XXXXXX)
compose() { docker compose --env-file /dev/null --profile distributed "$@"; }
down() { compose down --volumes --remove-orphans --timeout 5 >/dev/null 2>&1 || true; docker rm -f "$single" >/dev/null 2>&1 || true; }
trap 'status=$?; [ $status = 0 ] || { compose logs --tail 15; docker logs --tail 15 "$single"; } 2>/dev/null; down; rm -rf "$scratch"; exit $status' EXIT
say() { printf '%6.1f s  %s\n' "$(echo "$(date +%s.%N) - $began" | bc 2>/dev/null || echo $SECONDS)" "$*"; }
check() { local what=$1; shift; if "$@" >"$scratch/out" 2>&1; then say "ok    $what"; else say "FAIL  $what"; cat "$scratch/out"; exit 1; fi; }
within() { local seconds=$1 until; shift; until=$((SECONDS + seconds)); until "$@"; do [ $SECONDS -lt $until ] || return 1; sleep 0.2; done; }
sql() { compose exec -T db psql -U postgres -d orchestrator -qAtX -v ON_ERROR_STOP=1 -c "$1"; }
is() { [ "$(sql "$2")" = "$1" ] || { echo "not $1: $(sql "$2")"; return 1; }; }
healthy() { [ "$(docker inspect -f '{{.State.Health.Status}}' "$1")" = healthy ]; }
began=$(date +%s.%N)
down

# The image alone -------------------------------------------------------------------------------------------------------
check "make docker-build" make -s docker-build
check "docker compose accepts the file" compose config --quiet
check "the database is up" compose up -d --wait db
cat >"$scratch/handlers.py" <<'PYTHON'
import time
def stubborn(task):
    time.sleep(4)
    return "finished"
HANDLERS = {"verify:stubborn": stubborn}
PYTHON
chmod -R a+rX "$scratch"
docker run -d --name "$single" --network ${COMPOSE_PROJECT_NAME}_default --read-only --tmpfs /tmp --cap-drop ALL \
    --security-opt no-new-privileges:true -v "$scratch/handlers.py:/work/handlers.py:ro" \
    -e DATABASE_URL="postgresql://postgres:$POSTGRES_PASSWORD@db/orchestrator" orchestrator >/dev/null
check "read-only and without capabilities, it becomes healthy" within 30 healthy "$single"
check "not root" test "$(docker exec "$single" id -u)" = 10001
check "its file system is read-only" docker exec "$single" sh -c '! touch /app/x 2>/dev/null && ! touch /work/x 2>/dev/null'
check "pg_dump is inside" docker exec "$single" pg_dump --version
check "other commands run: stats" docker run --rm --network ${COMPOSE_PROJECT_NAME}_default --read-only -e DATABASE_URL="postgresql://postgres:$POSTGRES_PASSWORD@db/orchestrator" orchestrator stats --json
sql "select orchestrator.enqueue('verify:stubborn')" >/dev/null
sql "select orchestrator.enqueue('verify:stubborn')" >/dev/null
check "a handlers file mounted at /work/handlers.py is used" within 10 is 2 "select count(*) from orchestrator.running_tasks where status = 'running'"
check "docker stop sends SIGTERM" docker stop -t 40 "$single"
check "it exits with 0" test "$(docker inspect -f '{{.State.ExitCode}}' "$single")" = 0
check "what ran was finished first" is 2 "select count(*) from orchestrator.tasks where status = 'completed' and result = '\"finished\"'"
check "and it said goodbye" is 0 "select count(*) from orchestrator.workers"
compose down --volumes >/dev/null 2>&1

# The default profile -----------------------------------------------------------------------------------------------------
check "default profile: docker compose up --wait" docker compose --env-file /dev/null up -d --wait
check "the page on port ${ORCHESTRATOR_PORT:-9090}" curl -fsS "http://127.0.0.1:${ORCHESTRATOR_PORT:-9090}/"
check "/ready" within 20 curl -fsS "http://127.0.0.1:${ORCHESTRATOR_PORT:-9090}/ready"
sql "select count(orchestrator.enqueue('demo:quick')) from generate_series(1, 1000)" >/dev/null
check "1,000 tasks enqueued by psql complete" within 30 is 1000 "select count(*) from orchestrator.tasks where status = 'completed'"
sql "select orchestrator.enqueue('task:backup', '{\"host\": \"db\", \"database\": \"orchestrator\", \"password_env\": \"BACKUP_PASSWORD\"}')" >/dev/null
check "a backup without its password says so" within 20 is 1 \
    "select count(*) from orchestrator.tasks where type = 'task:backup' and last_error like '%password_env%'"
sql "select orchestrator.enqueue('task:backup', '{\"host\": \"db\", \"database\": \"orchestrator\", \"password\": \"$POSTGRES_PASSWORD\"}')" >/dev/null
check "a backup of the database is made" within 30 is 1 \
    "select count(*) from orchestrator.tasks where type = 'task:backup' and status = 'completed' and (result ->> 'tables')::int > 0"
compose down --volumes >/dev/null 2>&1

# The profile distributed -----------------------------------------------------------------------------------------------------
services=(db worker-1 worker-2 worker-3)
for service in prometheus grafana; do
    image=$(compose config --images "$service" | grep "/$service:")
    if docker image inspect "$image" >/dev/null 2>&1 || docker pull -q "$image" >/dev/null 2>&1; then services+=("$service")
    else say "      $image can't be had here: $service is left out"; fi
done
has() { [[ " ${services[*]} " = *" $1 "* ]]; }
check "profile distributed: docker compose up --wait" compose up -d --wait "${services[@]}"
for port in 9091 9092 9093; do
    check "a worker on port $port" within 20 curl -fsS "http://127.0.0.1:$port/ready"
done
check "three workers, one leader" within 20 is "3|1" "select count(*), count(*) filter (where is_leader) from orchestrator.workers"
if has prometheus; then
    check "Prometheus sees three workers" within 60 sh -c \
        "curl -fsS 'http://127.0.0.1:${PROMETHEUS_PORT:-9090}/api/v1/query?query=sum(up%7Bjob=%22orchestrator%22%7D)' | grep -q '\"3\"'"
    check "and the alert rules are loaded" sh -c "curl -fsS http://127.0.0.1:${PROMETHEUS_PORT:-9090}/api/v1/rules | grep -q WorkerDown"
fi
if has grafana; then
    check "Grafana has the dashboard" within 60 sh -c \
        "curl -fsS -u admin:${GRAFANA_PASSWORD:-orchestrator} 'http://127.0.0.1:${GRAFANA_PORT:-3000}/api/search?query=' | grep -qi orchestrator"
fi
sql "select count(orchestrator.enqueue('demo:slow', '{\"seconds\": 3}')) from generate_series(1, 60)" >/dev/null
check "all three have tasks" within 10 is 3 "select count(distinct worker_id) from orchestrator.running_tasks"
docker kill -s KILL "$(compose ps -q worker-2)" >/dev/null
check "one is killed: the others recover its tasks, all 60 complete" within 90 is 60 "select count(*) from orchestrator.tasks where status = 'completed'"
check "its tasks were recovered" test "$(sql "select count(*) from orchestrator.task_events where event = 'recovered'")" -gt 0
check "audit() finds nothing" is 0 "select count(*) from orchestrator.audit()"
check "--scale worker=3 adds three" compose up -d --wait --no-recreate --scale worker=3 "${services[@]}" worker
check "they register" within 30 is t "select count(*) >= 5 from orchestrator.workers where declared_dead_at is null"
sql "select count(orchestrator.enqueue('demo:slow', '{\"seconds\": 20}')) from generate_series(1, 10)" >/dev/null
check "tasks run" within 10 is 10 "select count(*) from orchestrator.running_tasks"
check "docker compose stop of all workers" compose stop worker worker-1 worker-2 worker-3
check "gave their tasks back, uncharged" is "10|0" "select count(*), max(attempts) from orchestrator.tasks where status = 'pending'"
check "audit() finds nothing" is 0 "select count(*) from orchestrator.audit()"
say "all of it worked"
