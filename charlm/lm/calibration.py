"""Chooses the weights of a mixture on the held-out part of train, with an n-gram that has not counted it."""

from __future__ import annotations

import torch
from torch import Tensor

from charlm.lm.corpus import Corpus
from charlm.lm.evaluate import predictions, surprisals
from charlm.lm.held_out import CHUNK, behind, fitted_ngram, training_end
from charlm.lm.models import Mixture
from charlm.lm.models.mixture import weight_terms


class Calibration:
    """The predictions of an n-gram that has counted at most `most` tokens of train, none of them held out.

    They stay the same while the network of the mixture is trained.
    """

    def __init__(self, corpus: Corpus, model: Mixture, most: int) -> None:
        total = corpus.tokens("train")
        end = training_end(corpus, model.network.block_size)
        self.rows, first = behind(predictions(model.network, corpus, "train"), end)
        ngram = fitted_ngram(corpus, model.ngram.order, end, most)
        terms: list[Tensor] = [torch.empty(0, len(model.weights), dtype=torch.float64)]
        nats: list[Tensor] = [torch.empty(0, dtype=torch.float64)]
        for idx, targets in corpus.examples("train", ngram.block_size).slice(first, total).chunks(CHUNK):
            contexts = ngram.contexts(idx)
            terms.append(weight_terms(ngram, contexts))
            nats.append(ngram.surprisal(contexts, targets))
        self.terms, self.nats = torch.cat(terms), torch.cat(nats)

    def fit(self, model: Mixture) -> None:
        """Fits the weights of `model` to its network."""
        if len(self.nats):
            rows = self.rows.to(model.weights.device)
            model.fit_weights(surprisals(model.network, rows).cpu(), self.nats, self.terms)
