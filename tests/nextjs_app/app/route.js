// A route and no page: the development server compiles React for a page, which takes four times as long and tests nothing of ours.
export function GET() {
  return new Response('Hello from Next.js')
}
