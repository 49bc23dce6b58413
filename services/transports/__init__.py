"""How published weights travel from the learner to workers and evaluator (`learner.publish_through`).

One file a transport. What they carry is proven by who sends and who receives (services/policy_store.py).
"""
