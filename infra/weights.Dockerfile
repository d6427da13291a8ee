# An image that has your weights in it, for pods without a volume; its context is the folder with the weights:
#
#   docker build --file infra/weights.Dockerfile --tag negfacediff:cuda-weights weights
FROM negfacediff:cuda
COPY . /app/weights
