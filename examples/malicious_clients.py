"""Malicious clients against the plain mean and against a robust rule."""

import rayfed_lora

if __name__ == "__main__":
    recipe = rayfed_lora.Recipe.load("examples/small.yaml").with_(
        {
            "clients.attack": {"name": "sign-flip", "share": 0.25, "factor": 4.0},
            # Krum looks at each client's update: it needs one mean of them at equal ranks.
            "clients.per_round": 12,
        }
    )
    for rule in ("factor-average", "median"):
        result = rayfed_lora.run(recipe.with_({"aggregation.rule": rule}))
        malicious = result.clients.groupby("client")["malicious"].first().sum()
        accuracy = result.summary["final"]["eval_accuracy"]
        print(f"{rule}: accuracy {accuracy:.3f} with {malicious} malicious clients of 12")
