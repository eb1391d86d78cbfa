#!/usr/bin/env bash
# Prepares WMT'14 English-German: Europarl v7, Common Crawl and News Commentary v9, punctuation normalised, tokenised with
# hyphens split, every 100th pair held out for validation, joint BPE of 32,764 merges, cleaned (1 to 250 subwords, length
# ratio 1.5). The test set is newstest2014. Needs about 15 GB of disk.

# shellcheck source=prepare_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/prepare_common.sh"

NAME=wmt14_en-de SOURCE=en TARGET=de
URL=https://www.statmt.org
parse_prepare_arguments "$@"

need $URL/wmt13/training-parallel-europarl-v7.tgz europarl-v7.de-en.{en,de}
need $URL/wmt13/training-parallel-commoncrawl.tgz commoncrawl.de-en.{en,de}
need $URL/wmt14/training-parallel-nc-v9.tgz news-commentary-v9.de-en.{en,de}
need $URL/wmt14/test-full.tgz newstest2014-deen-src.en.sgm newstest2014-deen-ref.de.sgm
prepare_wmt14 deen 32764 100 europarl-v7.de-en commoncrawl.de-en news-commentary-v9.de-en
