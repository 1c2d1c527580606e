# Commands of fewshot-diti on a CPU:
#   docker build -t fewshot-diti .
#   docker run --rm -v "$PWD:/data" fewshot-diti demo --output_dir demo
FROM python:3.13-slim

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY fewshot_diti ./fewshot_diti
# torch without CUDA, which would take gigabytes
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "torch>=2.10" "torchvision>=0.25" \
    && pip install --no-cache-dir . \
    && useradd --create-home --uid 1000 user

USER 1000
WORKDIR /data
ENTRYPOINT ["fewshot-diti"]
CMD ["--help"]
