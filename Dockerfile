# One GPU: the package with CUDA's PyTorch, from this clone. Nobody has built or run it yet.
#   docker build -t trl-instruct .
#   docker run --gpus all --shm-size 8g -v "$PWD:/work" trl-instruct \
#     sh -c 'trl-instruct init mine && trl-instruct sft --config recipes/configs/mine/sft.yaml'
FROM python:3.11-slim
# A C compiler is what Triton needs for its kernels.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip install --no-cache-dir -c /src/constraints.txt '/src[label]'
ENV HF_HOME=/work/.cache/huggingface
WORKDIR /work
CMD ["trl-instruct", "--help"]
