"""An own objective with client memory: SCAFFOLD (arXiv:1910.06378), as the built-in one."""

from dataclasses import dataclass

import rayfed_lora
from rayfed_lora.plugins import objective


@objective(memory="trained", message="trained", shared="trained", plain_sgd=True)
@dataclass(frozen=True)
class ControlVariates:
    """Correct each gradient by the difference of the server's and the client's variate."""

    def gradient(self, local):
        for name, gradient in local.gradients.items():
            gradient.add_(local.shared[name] - local.memory[name])

    def after(self, done):
        memory = {
            name: old
            - done.shared[name]
            + (done.start[name] - done.end[name]) / (done.steps * done.lr)
            for name, old in done.memory.items()
        }
        return memory, {name: new - done.memory[name] for name, new in memory.items()}

    def server(self, shared, messages, clients):
        return {name: c + messages[name].sum(axis=0) / clients for name, c in shared.items()}


if __name__ == "__main__":
    settings = {"method": "fedavg", "clients.optimizer": {"name": "sgd", "lr": 0.05}}
    recipe = rayfed_lora.load_recipe("examples/small.yaml", settings, plugins=[ControlVariates()])
    print(rayfed_lora.run(recipe).rounds[["round", "eval_accuracy", "bytes_up"]])
