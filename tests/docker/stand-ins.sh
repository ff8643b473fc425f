#!/usr/bin/env bash
# Makes stand-ins for the images python:3.13-slim-trixie, postgres:18 and prom/prometheus, for a machine that reaches Debian and
# PyPI but no registry of images. Needs root, debootstrap, and a Docker engine (DOCKER_HOST). There is none for Grafana: verify.sh
# leaves that service out. Never run it where the real images can be had: it takes their names.
set -euo pipefail
cd "$(dirname "$0")"
root=$(mktemp -d /tmp/stand-in-XXXXXX)
trap 'rm -rf "$root"' EXIT
if ! docker image inspect python:3.13-slim-trixie >/dev/null 2>&1; then
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep '/debian/$' | head -1)
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip,python3-venv trixie "$root" "$mirror" >/dev/null
    # behind a proxy with a certificate of its own, pip in a build needs the machine's bundle
    [ -z "${PIP_CERT:-}" ] || cp "$PIP_CERT" "$root/etc/ssl/certs/ca-certificates.crt"
    ln -sf python3 "$root/usr/bin/python"
    tar -C "$root" -c . | docker import -c 'ENV PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin PIP_BREAK_SYSTEM_PACKAGES=1 PIP_CERT=/etc/ssl/certs/ca-certificates.crt' \
        - python:3.13-slim-trixie
fi
docker build -t postgres:18 postgres
docker build -t "$(sed -nE 's/.*image: (prom.prometheus:.*)/\1/p' ../../docker-compose.yml)" prometheus
