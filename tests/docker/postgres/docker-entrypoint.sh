#!/bin/sh
# What the official image does with POSTGRES_PASSWORD, _USER, _DB and PGDATA, and no more.
set -eu
user=${POSTGRES_USER:-postgres} database=${POSTGRES_DB:-${POSTGRES_USER:-postgres}}
if [ "$(id -u)" = 0 ]; then
    mkdir -p "$PGDATA"
    chown -R postgres "$PGDATA" /run/postgresql
    exec setpriv --reuid=postgres --regid=postgres --init-groups "$0" "$@"
fi
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    umask 077
    printf %s "$POSTGRES_PASSWORD" >/tmp/password
    initdb -U "$user" --auth-local=trust --auth-host=scram-sha-256 --pwfile=/tmp/password -E UTF8 --locale=C.UTF-8 >/dev/null
    rm /tmp/password
    echo 'host all all all scram-sha-256' >>"$PGDATA/pg_hba.conf"
    pg_ctl -w -o "-c listen_addresses=''" start >/dev/null
    [ "$database" = postgres ] || createdb -U "$user" "$database"
    pg_ctl -w -m fast stop >/dev/null
fi
[ "$1" = postgres ] && shift
exec postgres -c listen_addresses='*' "$@"
