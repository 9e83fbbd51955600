"""The page's style sheet. Colours are Gradio's variables, so that it follows a dark theme; fonts
are the visitor's own, since nothing is fetched from elsewhere.
"""

STYLE = """
.gradio-container { width: 100%; max-width: 80rem !important; margin: 0 auto !important }
.gradio-container .gap, .gradio-container .column { gap: .55rem }
.fj-title { display: flex; align-items: baseline; gap: .9rem; flex-wrap: wrap;
  padding: .4rem 0 .2rem }
.fj-title h1 { font-size: 1.45rem; margin: 0; font-weight: 650 }
.fj-title span { color: var(--body-text-color-subdued); font-size: .86rem }
.fj-label { font-size: .74rem; letter-spacing: .05em; text-transform: uppercase;
  color: var(--body-text-color-subdued); margin: .5rem 0 .3rem }
.fj-row { display: flex; gap: .4rem; flex-wrap: wrap; align-items: center }
.fj-grow { flex: 1 }
.fj-tools { margin-top: .6rem }
.fj-editor button, .fj-gallery button, .fj-button { font: inherit; font-size: .84rem;
  padding: .32rem .75rem; border-radius: 7px; border: 1px solid var(--border-color-primary);
  background: var(--background-fill-primary); color: var(--body-text-color); cursor: pointer }
.fj-editor button:hover, .fj-gallery button:hover, .fj-button:hover {
  border-color: var(--color-accent) }
.fj-editor button:focus-visible, .fj-gallery button:focus-visible, .fj-token:focus-visible {
  outline: 2px solid var(--color-accent); outline-offset: 1px }
.fj-button input { display: none }
.fj-editor button.fj-primary { background: var(--color-accent); border-color: var(--color-accent);
  color: #fff; font-weight: 600; padding: .32rem 1.3rem }
.fj-parts { display: flex; flex-direction: column; gap: .4rem }
.fj-part { display: flex; align-items: center; gap: .6rem; padding: .35rem .5rem;
  border: 1px solid var(--border-color-primary); border-radius: 9px;
  background: var(--background-fill-primary) }
.fj-part textarea { flex: 1; border: 0; outline: 0; resize: vertical; background: transparent;
  color: var(--body-text-color); font: inherit; font-size: .95rem; padding: .3rem; min-width: 0;
  box-shadow: none }
.fj-part textarea::placeholder { color: var(--body-text-color-subdued); opacity: .7 }
.fj-part:focus-within { border-color: var(--color-accent) }
.fj-what { flex: 1; color: var(--body-text-color-subdued); font-size: .84rem }
.fj-moves { display: flex; gap: .15rem; opacity: .45 }
.fj-part:hover .fj-moves, .fj-part:focus-within .fj-moves { opacity: 1 }
.fj-editor .fj-moves button, .fj-editor .fj-shot button { border: 0; background: none;
  padding: .1rem .35rem; color: var(--body-text-color-subdued) }
.fj-part img, .fj-shot img, .fj-card img, .fj-heat img, .fj-token img { border-radius: 5px;
  display: block; margin: 0 }
.fj-part img { height: 72px } .fj-shot img { height: 40px }
.fj-shot { display: flex; align-items: center; gap: .4rem; font-size: .8rem; padding: .25rem;
  border: 1px solid var(--border-color-primary); border-radius: 8px; max-width: 17rem }
.fj-shot span, .fj-card figcaption { overflow: hidden; text-overflow: ellipsis;
  display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical }
.fj-cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.6rem, 1fr));
  gap: .5rem; margin-top: .5rem; max-height: 24rem; overflow: auto; padding: 2px }
.fj-card { margin: 0; padding: .4rem; border: 1px solid var(--border-color-primary);
  border-radius: 9px; font-size: .78rem; background: var(--background-fill-primary) }
.fj-card img { height: 72px; max-width: 100%; object-fit: cover; object-position: left }
.fj-card figcaption { margin: .3rem 0; line-height: 1.25 }
.fj-gallery .fj-card button { padding: .12rem .55rem; font-size: .76rem }
.fj-card.fj-on { border-color: var(--color-accent); box-shadow: 0 0 0 1px var(--color-accent) }
.fj-answer { min-height: 5.2rem; padding: .7rem; border: 1px solid var(--border-color-primary);
  border-radius: 9px; background: var(--background-fill-primary); line-height: 1.3 }
.fj-token { font: inherit; font-size: 1.02rem; border: 1px solid transparent; padding: .1rem;
  margin: 0 .06rem .2rem 0; border-radius: 7px; background: none; color: var(--body-text-color);
  display: inline-flex; flex-direction: column; align-items: center; gap: .2rem;
  vertical-align: top }
.fj-token:not([disabled]) { cursor: pointer }
.fj-token span { padding: .12rem .3rem; border-radius: 5px; white-space: pre;
  background: color-mix(in srgb, var(--color-accent) calc(6% + 34% * var(--share)), transparent) }
.fj-token img { height: 56px; margin: 0 .15rem .15rem }
.fj-token.fj-on { border-color: var(--color-accent) }
.fj-token:not([disabled]):hover { background: var(--background-fill-secondary) }
.fj-cursor { display: inline-block; width: .5rem; height: 1.1rem; vertical-align: text-bottom;
  background: var(--color-accent); animation: fj-blink 1s steps(2) infinite }
@keyframes fj-blink { 50% { opacity: 0 } }
.fj-truth, .fj-hint { font-size: .82rem; color: var(--body-text-color-subdued); margin-top: .35rem }
.fj-head { margin: .2rem 0 .5rem } .fj-block { font-size: .84rem }
.fj-block select { font: inherit; padding: .15rem .4rem; border-radius: 6px;
  border: 1px solid var(--border-color-primary); background: var(--background-fill-primary);
  color: var(--body-text-color) }
.fj-heat { display: flex; flex-wrap: wrap; gap: .7rem; margin: .5rem 0 }
.fj-heat figure { margin: 0; display: grid; grid-template-columns: auto auto; gap: .35rem }
.fj-heat figcaption { grid-column: 1 / 3; font-size: .78rem; color: var(--body-text-color-subdued) }
.fj-columns { display: flex; gap: 1.6rem; flex-wrap: wrap }
.fj-alternatives { flex: 1; min-width: 17rem }
.fj-alternatives table { border-collapse: collapse; width: 100%; font-size: .86rem }
.fj-alternatives td { padding: .14rem .4rem; border: 0; white-space: pre }
.fj-alternatives td:nth-child(2) { width: 60% }
.fj-alternatives td:nth-child(3) { text-align: right; font-variant-numeric: tabular-nums }
.fj-alternatives tr.fj-on td { font-weight: 650 }
.fj-bar { display: block; height: .7rem; border-radius: 3px; background: var(--color-accent);
  min-width: 1px; opacity: .75 }
.fj-visuals { flex: 1; min-width: 15rem } .fj-visuals .fj-card img { height: 56px }
.fj-status { min-height: 1.3rem; font-size: .85rem; color: var(--body-text-color-subdued) }
.fj-error { color: #b42318; background: #fef3f2; border: 1px solid #fda29b; border-radius: 7px;
  padding: .4rem .6rem }
"""
