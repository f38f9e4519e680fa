"""The planner: schedule, DAG, tradeoff curves, exact frontier, plans, policies, baselines.

Pure: numpy and networkx, no torch, no GPU, no framework. Start with `problem.PipelineProblem.of`, `solver.solve` and
`plan.make_plan`.
"""
