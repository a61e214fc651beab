"""A callback that ends a run: it sees each finished round, here the loss of training."""

import rayfed_lora


class Patience:
    """End the run once the training loss has not fallen for some rounds."""

    def __init__(self, rounds):
        self.rounds, self.best, self.since = rounds, float("inf"), 0

    def __call__(self, finished):
        loss = finished.record.train_loss
        self.since = 0 if loss < self.best else self.since + 1
        self.best = min(self.best, loss)
        return self.since >= self.rounds


if __name__ == "__main__":
    result = rayfed_lora.run("examples/small.yaml", callbacks=[Patience(rounds=2)])
    print(len(result.rounds), "rounds, stopped by", result.summary.get("stopped_by"))
