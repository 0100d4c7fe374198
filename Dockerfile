# blt serve in a container (docs/deploy.md):
#   docker build -t blt .
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/bundle:/bundle:ro" blt
# Options of `blt serve` follow the image's name.
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
WORKDIR /src
COPY LICENSE README.md pyproject.toml ./
COPY blt blt
COPY export/blt_export export/blt_export
COPY runtime/LICENSE runtime/README.md runtime/pyproject.toml runtime/
COPY runtime/blt_runtime runtime/blt_runtime
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels ./runtime .
RUN python -m venv /opt/blt && \
    /opt/blt/bin/pip install --no-cache-dir /wheels/blt_runtime-*.whl "$(echo /wheels/blt_lm-*.whl)[cpu,serve,grammar]"

FROM python:${PYTHON}-slim
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin blt
COPY --from=build /opt/blt /opt/blt
ENV PATH=/opt/blt/bin:$PATH BLT_PORT=8000
USER 10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import os, urllib.request as web; web.urlopen(\"http://127.0.0.1:%s/health\" % os.environ[\"BLT_PORT\"], timeout=4)"]
ENTRYPOINT ["blt", "serve", "/bundle", "--host", "0.0.0.0"]
