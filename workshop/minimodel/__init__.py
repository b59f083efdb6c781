"""The making of the mini model: autoencoder, scorers and judge, and the pretraining of the unified model.

Reading order: ``small`` (drawn pictures and one resumable loop), ``autoencoder``, ``encoders``, ``corpus``, ``seeing``,
``pretrain``. All train on endless characters of the mini world and never on its cast.
"""
