#!/usr/bin/env bash
# Prepares WMT'14 English-French: Europarl v7, Common Crawl, United Nations, News Commentary v9 and Giga, punctuation
# normalised, tokenised with hyphens split, every 1333rd pair held out for validation, joint BPE of 40,000 merges, cleaned
# (1 to 250 subwords, length ratio 1.5). The test set is newstest2014. Needs about 150 GB of disk.

# shellcheck source=prepare_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/prepare_common.sh"

NAME=wmt14_en-fr SOURCE=en TARGET=fr
URL=https://www.statmt.org
parse_prepare_arguments "$@"

need $URL/wmt13/training-parallel-europarl-v7.tgz europarl-v7.fr-en.{en,fr}
need $URL/wmt13/training-parallel-commoncrawl.tgz commoncrawl.fr-en.{en,fr}
need $URL/wmt13/training-parallel-un.tgz undoc.2000.fr-en.{en,fr}
need $URL/wmt14/training-parallel-nc-v9.tgz news-commentary-v9.fr-en.{en,fr}
need $URL/wmt10/training-giga-fren.tar giga-fren.release2.fixed.{en,fr}
need $URL/wmt14/test-full.tgz newstest2014-fren-src.en.sgm newstest2014-fren-ref.fr.sgm
prepare_wmt14 fren 40000 1333 europarl-v7.fr-en commoncrawl.fr-en undoc.2000.fr-en news-commentary-v9.fr-en \
    giga-fren.release2.fixed
