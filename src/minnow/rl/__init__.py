"""Reinforcement learning: rollouts from the engine, rewards, advantages, and the value tracker of SPO."""
