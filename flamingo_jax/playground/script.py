"""What the page's own parts do in the browser: JavaScript that Gradio's HTML component runs once
for each part. `fragments.py` has the elements that it looks for.
"""

EDITOR = """
const texts = () => Object.fromEntries(
  [...element.querySelectorAll('textarea[data-part]')].map(t => [t.dataset.part, t.value]));
window.playgroundTexts = texts;
const act = (what, more = {}) => trigger('edit', {what, texts: texts(), ...more});
// Morphing the page leaves a text that was typed into: it is replaced where the server's is new.
watch('value', () => element.querySelectorAll('textarea[data-part]').forEach(
  t => { t.value = t.getAttribute('value'); }));
const answer = () => trigger('answer', {texts: texts()});
element.addEventListener('click', event => {
  const button = event.target.closest('[data-do]');
  if (!button) return;
  const what = button.dataset.do;
  if (what === 'answer') answer();
  else if (what === 'stop') trigger('stop', {});
  else act(what, {index: button.dataset.index});
});
element.addEventListener('keydown', event => {
  if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  answer();
});
const send = async files => {
  const paths = [], refused = [];
  for (const file of files) {
    if (file.size > props.most) { refused.push(file.name); continue; }
    try { paths.push((await upload(file)).path); } catch (error) { refused.push(file.name); }
  }
  if (paths.length || refused.length) act('upload', {paths, refused});
};
element.addEventListener('change', event => {
  if (!event.target.matches('[data-files]')) return;
  const files = [...event.target.files];
  event.target.value = '';
  send(files);
});
const carried = event => [...((event.dataTransfer || event.clipboardData || {}).files || [])];
for (const kind of ['dragover', 'drop', 'paste'])
  element.addEventListener(kind, event => {
    if (kind !== 'dragover' && !carried(event).length) return;
    if (kind !== 'paste') event.preventDefault();
    if (kind !== 'dragover') send(carried(event));
  });
"""
"""Of the prompt. Every click carries the texts as typed, so that none is lost to an event that
arrives before another."""

GALLERY = """
element.addEventListener('click', event => {
  const button = event.target.closest('[data-do]');
  if (!button) return;
  const texts = window.playgroundTexts ? window.playgroundTexts() : {};
  trigger('edit', {what: button.dataset.do, index: button.dataset.index, texts});
});
"""

ANSWER = """
element.addEventListener('click', event => {
  const button = event.target.closest('[data-do=token]');
  if (button) trigger('look', {index: button.dataset.index});
});
"""

LOOK = """
element.addEventListener('change', event => {
  if (event.target.matches('[data-block]')) trigger('look', {block: event.target.value});
});
"""
