// Reporter for `node --test`: one JSON record per test on stdout, read by run_tests.py.
// An id is "path/of/the.test.js::outer name > inner name".  It runs in node's parent process; test files run in children.
import { relative } from 'node:path';

const nonce = process.env.SRL_NONCE;
delete process.env.SRL_NONCE;

export default async function* reporter(source) {
  const names = [];
  for await (const { type, data } of source) {
    if (type === 'test:start') {
      names.length = data.nesting;
      names[data.nesting] = data.name;
    }
    if (type !== 'test:pass' && type !== 'test:fail') continue;
    if (type === 'test:pass' && data.details?.type === 'suite') continue;
    const path = [...names.slice(0, data.nesting), data.name].join(' > ');
    const file = data.file ? relative('/repo', data.file) : '';
    const skipped = data.skip !== undefined || data.todo !== undefined;
    const outcome = type === 'test:fail' ? 'failed' : skipped ? 'skipped' : 'passed';
    yield JSON.stringify({ nonce, id: `${file}::${path}`, outcome }) + '\n';
  }
  yield JSON.stringify({ nonce, end: true }) + '\n';
}
