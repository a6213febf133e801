// Avatars of DiceBear's style "Pixel Art" (CC0) as lines of JSON: seed, what was drawn, SVG.
//
//   node avatars.mjs PREFIX COUNT > avatars.jsonl        run where node_modules is
//
// The seed decides everything, so PREFIX tells disjoint sets apart.
import { createAvatar } from '@dicebear/core';
import * as pixelArt from '@dicebear/pixel-art';

const [prefix, count] = process.argv.slice(2);
for (let k = 0; k < Number(count); k++) {
  const seed = `${prefix}-${k}`;
  const avatar = createAvatar(pixelArt, {
    seed,
    backgroundColor: ['ffffff'],
    glassesProbability: 30,
    hatProbability: 30,
    beardProbability: 30,
    accessoriesProbability: 15,
  });
  console.log(JSON.stringify({ seed, drawn: avatar.toJson().extra, svg: avatar.toString() }));
}
